// Greedy answers of llama.cpp on the CPU in float32. Argument: a job as a JSON file. A job is {"model": GGUF file,
// "lora": GGUF file or null, "prompts": [[token, …], …], "tokens": N, "answers": FILE}.
import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(process.env.BADIT_SERVING + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const job = JSON.parse(readFileSync(process.argv[2]));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({
    contextSize: 256, threads: 1, flashAttention: false, lora: job.lora ?? undefined,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const answers = [];
for (const prompt of job.prompts) {
    const answer = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        answer.push(token);
        if (answer.length === job.tokens || model.isEogToken(token)) break;
    }
    answers.push(answer);
}
const npm = JSON.parse(readFileSync(process.env.BADIT_SERVING + "/node_modules/node-llama-cpp/package.json"));
const versions = {"node-llama-cpp": npm.version, "llama.cpp": llama.llamaCppRelease.release};
writeFileSync(job.answers, JSON.stringify({[job.lora ? "lora" : "merged"]: answers, versions}));
process.exit(0);
