// Asks the server for an answer and reads its server-sent events as they come. (EventSource can only GET.)

export async function* ask(question, signal) {
  const response = await request("/api/answer", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question), signal,
  });
  if (!response.ok) throw new Error((await response.json()).error);
  let rest = "";
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const events = (rest + piece).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [name, data] = event.split("\n");
      yield { name: name.slice("event: ".length), ...JSON.parse(data.slice("data: ".length)) };
    }
  }
}

// What `for await` over the stream itself would do, where browsers can.
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {}); // of a stream that broke off, the error is known already
  }
}

export async function get(address) {
  const response = await request(address);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

async function request(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The studio does not answer; is it still running?");
  }
}
