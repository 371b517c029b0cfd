"""Reference implementations of the method's formulas in float64, and of Rouge-L, for the tests.

Arguments may be tensors or arrays; functions return arrays. Component i is row i of A (N, in) and
column i of B (out, N); its gradient is the concatenation of both gradients.
"""

import itertools
import math
import unicodedata

import numpy as np
import scipy.linalg
import torch
from nltk.stem.porter import PorterStemmer
from scipy.optimize import linear_sum_assignment


def float64(values):
    """Returns a tensor or array as a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64)
    return np.asarray(values, dtype=np.float64)


# --- decomposition (BAD) ---
def singular_triples(weight, rank):
    """Returns U (out, rank), σ (rank) and Vᵀ (rank, in) of the largest singular triples."""
    u, s, vh = np.linalg.svd(float64(weight), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def closest_of_rank(weight, rank):
    """Returns the sum of the largest singular triples (Eckart and Young)."""
    u, s, vh = singular_triples(weight, rank)
    return (u * s) @ vh


# --- grouping (DOG) ---
def unit_gradients(grad_A, grad_B):
    """Returns rows ĝ_i (N, in + out); zeros for a gradient that is zero or not finite."""
    gradients = np.concatenate([float64(grad_A), float64(grad_B).T], axis=1)
    lengths = np.linalg.norm(gradients, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    return np.where(usable, gradients, 0.0) / np.where(usable, lengths, 1.0)


def cosine_gram(grad_A, grad_B):
    unit = unit_gradients(grad_A, grad_B)
    return np.array([[float(np.dot(row, other)) for other in unit] for row in unit])


def objective(gradients, labels):
    """Returns Σ_k ‖Σ_{i ∈ k} ĝ_i‖², computed from the gradients instead of the Gram matrix."""
    sums = [gradients[np.asarray(labels) == k].sum(axis=0) for k in np.unique(labels)]
    return sum(float(group_sum @ group_sum) for group_sum in sums)


def best_objective(gradients, num_experts):
    """Returns the optimum over all balanced partitions, by exhaustive search."""
    size = len(gradients) // num_experts

    def best(free):
        if not free:
            return 0.0
        groups = [[free[0], *others] for others in itertools.combinations(free[1:], size - 1)]
        sums = [gradients[group].sum(axis=0) for group in groups]
        rests = [[i for i in free if i not in group] for group in groups]
        return max(
            float(total @ total) + best(remaining)
            for total, remaining in zip(sums, rests, strict=True)
        )

    return best(range(len(gradients)))


def best_exchange(gradients, labels):
    """Returns the largest gain of the objective from a swap of two components."""
    gains = []
    for i, j in itertools.combinations(range(len(gradients)), 2):
        exchanged = np.array(labels)
        exchanged[[i, j]] = exchanged[[j, i]]
        gains.append(objective(gradients, exchanged) - objective(gradients, labels))
    return max(gains)


def k_means_plus_plus(gradients, num_experts, rng):
    """Returns the nearest of K gradients, the seeds, for each gradient.

    The first seed is drawn uniformly. Each further one is the best of 2 + ⌊ln K⌋ candidates, which
    are drawn with probability ∝ D², the squared distance to the nearest seed: the one with the
    smallest Σ D² after it.
    """

    def squared_distances(seeds):
        return [[float(((row - gradients[s]) ** 2).sum()) for s in seeds] for row in gradients]

    components = len(gradients)
    seeds = [rng.integers(components)]
    while len(seeds) < num_experts:
        nearest = np.array([min(row) for row in squared_distances(seeds)])
        weights = nearest if nearest.sum() > 0 else np.ones(components)
        candidates = rng.choice(
            components, size=2 + int(math.log(num_experts)), p=weights / weights.sum()
        )
        totals = [sum(min(row) for row in squared_distances([*seeds, c])) for c in candidates]
        seeds.append(candidates[int(np.argmin(totals))])
    return np.argmin(squared_distances(seeds), axis=1)


def polar_grouping(gradients, labels, num_experts, size, rounds=50):
    """Runs the paper's loop until the labels are stable, and returns the labels.

    Targets: C (dimensions, K) holds the groups' sums, C = U Σ Vᵀ, Q = U Vᵀ. Assignment: max Σ_ik
    π_ik ⟨ĝ_i, q_k⟩ with exactly ``size`` components per expert: every expert has ``size`` slots.
    """
    slots = np.repeat(np.arange(num_experts), size)
    for _ in range(rounds):
        C = np.stack([gradients[labels == k].sum(axis=0) for k in range(num_experts)], axis=1)
        u, _, vh = np.linalg.svd(C, full_matrices=False)
        _, chosen = linear_sum_assignment((gradients @ (u @ vh))[:, slots], maximize=True)
        if (slots[chosen] == labels).all():
            break
        labels = slots[chosen]
    return labels


def change_norms(A, B, initial_A, initial_B):
    """Returns the Frobenius norm of every component's change, from its matrices."""
    A, B, initial_A, initial_B = map(float64, (A, B, initial_A, initial_B))
    return np.array(
        [
            np.linalg.norm(np.outer(B[:, i], A[i]) - np.outer(initial_B[:, i], initial_A[i]))
            for i in range(len(A))
        ]
    )


def exchanged_smallest(gradients, labels, norms, share):
    """Exchanges the best pair of the components with the smallest norms until none improves."""
    order = sorted(range(len(norms)), key=lambda i: (norms[i], i))
    free = sorted(order[: round(share * len(norms))])
    labels = np.array(labels)
    while True:
        best, exchanged = objective(gradients, labels) * (1 + 1e-6), None
        for i, j in itertools.combinations(free, 2):
            trial = labels.copy()
            trial[[i, j]] = labels[[j, i]]
            if objective(gradients, trial) > best:
                best, exchanged = objective(gradients, trial), trial
        if exchanged is None:
            return labels
        labels = exchanged


def angles(gradients, labels):
    """Returns mean angles in degrees within and between experts, then mean |cos|.

    Zero gradients are ignored.
    """
    cosines = {True: [], False: []}
    for i, j in itertools.combinations(np.flatnonzero(gradients.any(axis=1)), 2):
        cosines[bool(labels[i] == labels[j])].append(
            max(-1.0, min(1.0, float(gradients[i] @ gradients[j])))
        )
    values = [
        function(of)
        for function in (lambda of: np.degrees(np.arccos(of)), np.abs)
        for of in cosines.values()
    ]
    return tuple(
        float(np.mean(angle_list)) if len(angle_list) else math.nan for angle_list in values
    )


# --- routing ---
def segment_means(x, mask, segments, count):
    """Returns the mean over the masked positions of each segment of packed rows; 0 without any."""
    rows_of = [float64(x)[np.asarray(mask & (segments == s))] for s in range(count)]
    return np.array([rows.sum(axis=0) / max(len(rows), 1) for rows in rows_of])


def prompt_mean(x, mask):
    """Returns x̄ (batch, features), the mean over positions with a true mask; 0 without any."""
    return segment_means(x, np.asarray(mask) == 1, np.indices(mask.shape)[0], len(mask))


def prompt_moments(batches):
    """Returns mean and variance (features) over batches of prompts.

    The n-th batch weighs max(1/n, 1/50).
    """
    mean = variance = np.zeros(np.shape(batches[0])[1])
    for n, batch in enumerate(batches, start=1):
        weight = max(1 / n, 0.02)
        rows = float64(batch)
        new_mean = (1 - weight) * mean + weight * rows.mean(axis=0)
        # The variance of the mixture of old and new values, about the new mean.
        was = variance + (mean - new_mean) ** 2
        came = ((rows - new_mean) ** 2).mean(axis=0)
        mean = new_mean
        variance = (1 - weight) * was + weight * came
    return mean, variance


def standardised(x, mean, variance):
    """Returns x̂: features standardised and scaled to a mean norm of 8.

    It is 0 where the variance or the whole row is 0.
    """
    unit = (float64(x) - mean) / np.sqrt(np.where(variance > 0, variance, np.inf))
    return 8 / math.sqrt(len(mean)) * unit * float64(x).any(axis=-1, keepdims=True)


def expert_gates(logits, kind="mean_one", top_k=None):
    """Returns gates (..., K): softmax over the largest logits, times K if mean_one.

    On ties, the lower index counts as larger.
    """
    logits = float64(logits)
    gates = np.zeros_like(logits)
    for where in np.ndindex(*logits.shape[:-1]):
        row = logits[where].tolist()
        chosen = sorted(range(len(row)), key=lambda k: (-row[k], k))[:top_k]
        powers = np.exp([row[k] - max(row) for k in chosen])
        gates[where][chosen] = powers / powers.sum() * (len(row) if kind == "mean_one" else 1)
    return gates


def cluster_gates(x, centroids, codes):
    """Returns the gates of each row of x: the code of the centroid with the largest cosine."""
    centroids = float64(centroids)
    return np.array(
        [codes[max(range(len(centroids)), key=lambda c: centroids[c] @ row)] for row in float64(x)]
    )


# --- the adapted layer ---
def layer_output(weight, x, dropped, factors, initial, gates, scaling, share):
    """Returns y (rows, out) for inputs x (rows, in), with ``dropped`` in place of x after dropout.

    Component i adds s · g_i B_i A_i x, of which the part s · share · B0_i A0_i x is subtracted.
    Dropout applies to its change since the start at the present gates, g_i (B_i A_i − B0_i A0_i) x.
    """
    x, dropped, gates = float64(x), float64(dropped), float64(gates)
    (A, B), (A0, B0) = (tuple(map(float64, pair)) for pair in (factors, initial))
    y = x @ float64(weight).T
    for row, i in np.ndindex(len(x), len(A)):
        change = B[:, i] * (A[i] @ dropped[row]) - B0[:, i] * (A0[i] @ dropped[row])
        kept = B0[:, i] * (A0[i] @ x[row])
        y[row] += scaling * (gates[row, i] * change + (gates[row, i] - share) * kept)
    return y


# --- orthogonal updates ---
def power(matrix, exponent, floor):
    """Returns (C + floor·‖C‖·1)^exponent by eigenvalues; zeros for a zero matrix."""
    matrix = float64(matrix)
    size = math.sqrt(float((matrix**2).sum()))
    if size == 0:
        return np.zeros_like(matrix)
    values, vectors = np.linalg.eigh(matrix + floor * size * np.eye(len(matrix)))
    return vectors @ np.diag(values**exponent) @ vectors.T


class OrthogonalFactor:
    """One factor's moments; see :func:`orthogonal_step`."""

    def __init__(self):
        self.steps = 0
        self.other_frame = None
        self.first = self.second = self.features = 0.0

    def update(self, other, gradient, beta_1, beta_2, floor):
        """Returns the update of rows (N, D) whose other factor has rows (N, D')."""
        components, length = gradient.shape
        if not other.any():
            self.__init__()
            return np.zeros_like(gradient)
        inverse = power(other @ other.T, -0.5, floor)
        frame = inverse @ other
        in_frame = inverse @ gradient
        first = np.zeros_like(gradient)
        second = np.zeros((components, components))
        if self.other_frame is not None:
            turn = frame @ self.other_frame.T
            first = turn @ self.first
            second = turn @ self.second @ turn.T
            escaped = max(0.0, (np.trace(self.second) - np.trace(second)) / components)
            second = second + escaped * np.eye(components)
        self.steps += 1
        self.other_frame = frame
        self.features = beta_2 * self.features + (1 - beta_2) * (in_frame**2).mean(axis=0)
        sizes = np.sqrt(self.features / (1 - beta_2**self.steps))
        scaled = np.divide(in_frame, sizes, out=np.zeros_like(in_frame), where=sizes > 0)
        self.second = beta_2 * second + (1 - beta_2) * scaled @ scaled.T / length
        whitened = power(self.second / (1 - beta_2**self.steps), -0.5, floor) @ scaled
        self.first = beta_1 * first + (1 - beta_1) * whitened
        return inverse @ self.first / (1 - beta_1**self.steps)


def orthogonal_step(A, B, grad_A, grad_B, of_A, of_B, lr, betas, floor=1e-6):
    """Returns A (N, in) and B (out, N) after one step.

    It changes the moments ``of_A`` and ``of_B`` in place.
    """
    A, B, grad_A, grad_B = map(float64, (A, B, grad_A, grad_B))
    largest = 0.1 * math.sqrt(float(((B @ A) ** 2).sum())) / (lr * math.sqrt(A.size))
    update_A = min(1.0, largest) * of_A.update(B.T, grad_A, *betas, floor)
    update_B = of_B.update(A, grad_B.T, *betas, floor).T
    return A - lr * update_A, B - lr * update_B


# --- abilities ---
def prompt_key(mean_embedding, embeddings, ridge=1e-3):
    """Returns z of one prompt: the whitened difference to the vocabulary's mean, as unit vector."""
    rows = float64(embeddings)
    mean = rows.mean(axis=0)
    covariance = sum(np.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)
    covariance += ridge * np.trace(covariance) / len(mean) * np.eye(len(mean))
    key = scipy.linalg.fractional_matrix_power(covariance, -0.5) @ (float64(mean_embedding) - mean)
    return key / np.linalg.norm(key)


def cluster_cosines(first, second):
    """Returns corrected cosines and reliabilities of clusters, from their halves' gradients."""
    first = float64(first) - float64(first).mean(axis=0)
    second = float64(second) - float64(second).mean(axis=0)
    clusters = range(len(first))
    norms = [np.linalg.norm(first[c]) * np.linalg.norm(second[c]) for c in clusters]
    squared = [max(first[c] @ second[c], 0.1 * norms[c]) for c in clusters]
    cosines = [
        [
            (first[c] @ second[d] + second[c] @ first[d]) / 2 / math.sqrt(squared[c] * squared[d])
            for d in clusters
        ]
        for c in clusters
    ]
    return np.array(cosines), np.array([first[c] @ second[c] / norms[c] for c in clusters])


def target_overlap(cosines):
    clusters = len(cosines)
    clipped = np.clip(cosines, 0, 1)
    pairs = [clipped[c, d] for c in range(clusters) for d in range(clusters) if c != d]
    target = 0.75 * clipped + 0.25 * np.mean(pairs)
    for c in range(clusters):
        target[c, c] = 1.0
    return target


def code_distance(codes, target):
    """Returns Σ over pairs of (overlap − target)² + 0.02 Σ_k (load_k − 1)², for codes (C, K)."""
    codes, target = float64(codes), float64(target)
    clusters, experts = codes.shape
    total = 0.0
    for c, d in itertools.permutations(range(clusters), 2):
        overlap = codes[c] @ codes[d] / np.linalg.norm(codes[c]) / np.linalg.norm(codes[d])
        total += (overlap - target[c, d]) ** 2
    return total + 0.02 * sum((experts * codes[:, k].mean() - 1) ** 2 for k in range(experts))


def use_of_components(codes, energy):
    """Returns E (N, K): expert k's mean gate over clusters, weighted by component i's energy."""
    codes, energy = float64(codes), float64(energy)
    return np.array(
        [
            [np.average(codes[:, k], weights=energy[:, i]) for k in range(codes.shape[1])]
            for i in range(energy.shape[1])
        ]
    )


def centred_gram(gradients):
    """Returns cosines (N, N) of gradients (C, N, P), minus their mean over clusters."""
    gradients = float64(gradients)
    centred = gradients - gradients.mean(axis=0)
    rows = [centred[:, i].ravel() for i in range(gradients.shape[1])]
    return np.array(
        [
            [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in rows]
            for row in rows
        ]
    )


def relative_energy(energy, labels):
    """Returns e (C, K): shares of energy in the experts, relative to their means over clusters."""
    energy, labels = float64(energy), np.asarray(labels)
    shares = np.array(
        [[row[labels == k].sum() / row.sum() for k in range(labels.max() + 1)] for row in energy]
    )
    return shares / shares.mean(axis=0)


# --- extensions ---
def key_moments(keys):
    """Returns the mean and the covariance of the keys of a cluster."""
    keys = float64(keys)
    mean = sum(keys) / len(keys)
    return mean, sum(np.outer(key - mean, key - mean) for key in keys) / len(keys)


def confused_share(keys, own, other):
    """Returns P(z · (other − own) > 0) of a normal z with the moments of a cluster's keys."""
    mean, covariance = key_moments(keys)
    difference = float64(other) - float64(own)
    deviation = math.sqrt(difference @ covariance @ difference)
    return 0.5 * math.erfc(-(mean @ difference) / deviation / math.sqrt(2))


def mixing_shares(cosines, temperature):
    """Returns, for each prompt, the shares of all tasks: those of the two nearest, or of one."""
    shares = []
    for of_prompt in float64(cosines):
        first, second = sorted(range(len(of_prompt)), key=lambda task: -of_prompt[task])[:2]
        ratio = math.exp((of_prompt[second] - of_prompt[first]) / temperature)
        share = ratio / (1 + ratio)
        row = [0.0] * len(of_prompt)
        row[first], row[second] = (1.0, 0.0) if share < 1e-3 else (1 - share, share)
        shares.append(row)
    return shares


def likeness(keys, by_cluster, centroids):
    """Returns the share of keys below three standard deviations of their cluster's cosines.

    And the distance of their mean from that of the clusters' keys.
    """
    unlike, difference = 0, 0.0
    for key in float64(keys):
        cosines = [key @ centroid for centroid in float64(centroids)]
        nearest = int(np.argmax(cosines))
        own = float64(by_cluster[nearest]) @ float64(centroids[nearest])
        # Equal prompts have no deviation, but rounding.
        unlike += cosines[nearest] < own.mean() - 3 * own.std() - 1e-4
        difference = difference + key - float64(by_cluster[nearest]).mean(axis=0)
    return unlike / len(keys), math.sqrt(((difference / len(keys)) ** 2).sum())


def new_directions(gradient, frozen, rank):
    """Returns the projector on the top right singular vectors of G (I − P), from the whole G."""
    gradient, frozen = float64(gradient), float64(frozen)
    projector = np.linalg.pinv(frozen) @ frozen
    outside = gradient @ (np.eye(gradient.shape[1]) - projector)
    _, _, directions = np.linalg.svd(outside)
    return directions[:rank].T @ directions[:rank]


# --- Rouge-L ---
# The beginnings of the names of characters in scripts without spaces between words.
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA LETTER", "THAI", "LAO", "KHMER", "MYANMAR")


def words(text):
    """Returns the stemmed words of a text, character by character."""
    found = []
    is_open = can_grow = False  # within a word, and whether a letter or digit continues it
    for character in text.lower():
        kind = unicodedata.category(character)[0]
        without_spaces = unicodedata.name(character, "").startswith(WITHOUT_SPACES)
        if (kind == "M" and is_open) or (kind in "LN" and can_grow and not without_spaces):
            found[-1] += character
        elif kind in "LN":
            found.append(character)
            is_open, can_grow = True, not without_spaces
        else:
            is_open = can_grow = False
    return [PorterStemmer().stem(word) if len(word) > 3 else word for word in found]


def common_length(a, b):
    """Returns the length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common_length(a[1:], b[1:])
    return max(common_length(a, b[1:]), common_length(a[1:], b))


def rouge_l(prediction, reference):
    """Returns the F-measure x 100 of the longest common subsequence of words."""
    answer, target = words(prediction), words(reference)
    common = common_length(answer, target)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(target)
    return 100 * 2 * precision * recall / (precision + recall)


# --- Preferences ---
def log_likelihood(logits, prompt, answer):
    """Returns log p(answer | prompt) from the logits (positions, vocabulary) of both."""
    total = 0.0
    for i, token in enumerate(answer):
        scores = logits[len(prompt) + i - 1].double()
        total += float(scores[token] - scores.exp().sum().log())
    return total


def preference_accuracy(margins):
    """Returns the share x 100 of pairs whose chosen answer has the larger reward."""
    return 100 * sum(margin > 0 for margin in margins) / len(margins)


def dpo_loss(margins, beta):
    """Returns the mean of -log sigmoid(beta * margin)."""
    return sum(-math.log(1 / (1 + math.exp(-beta * margin))) for margin in margins) / len(margins)


# --- Verdicts of comparisons ---
def verdict(nll, score):
    """Returns the documented verdict on a method from (low, inner_low, inner_high, high) twice."""

    def shows(interval, margin, better):
        low, inner_low, inner_high, high = interval
        if -margin < inner_low and inner_high < margin:
            return "level"
        if low <= 0 <= high:
            return "nothing"
        return "better" if better(high) else "worse"

    of_nll = shows(nll, 0.01, lambda end: end < 0)
    of_score = shows(score, 0.5, lambda end: end > 0)
    names = {"better": "ahead of", "worse": "behind", "level": "level with"}
    if of_nll != of_score or of_nll not in names:
        return "not decided against"
    return names[of_nll]


# --- Similarity of gates ---
def gate_similarity(profiles):
    """Returns the similarity of every two rows (T, G): their correlation, moved from −1/(T−1) to 0.

    The line through (−1/(T−1), 0) and (1, 1).
    """
    profiles = float64(profiles)
    tasks = len(profiles)
    unrelated = -1 / (tasks - 1)
    deviations = profiles - sum(profiles) / tasks
    similarity = np.empty((tasks, tasks))
    for i, row in enumerate(deviations):
        for j, other in enumerate(deviations):
            correlation = np.corrcoef(row, other)[0, 1]
            similarity[i, j] = (correlation - unrelated) / (1 - unrelated)
    return similarity
