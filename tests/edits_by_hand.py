"""The edits of weights worked out with plain NumPy in float64, on a model small enough to write down.

`python tests/edits_by_hand.py` writes tests/data/edits_by_hand.json. No library code, no PyTorch.
"""

import json
import math
from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "data/edits_by_hand.json"
VOCAB, PLACES, WIDTH, UNITS = 7, 6, 4, 5  # of a GPT-2 of one layer whose attention adds nothing
TEXTS = [[1, 2, 3, 4, 5], [2, 4, 6], [5, 5, 1, 6]]
LORA_RANK, LORA_RATE, RANK, RATE, EPOCHS = 2, 0.3, 2, 0.05, 3
STEPS, SHARE = 4, 0.5
ALPHA, BETA = 0.4, 0.1
TOP, SCALE = 0.3, 0.75
# in the order of the model's parameters: wte, wpe, then the layer's; the gains of the norms are around 1
SHAPES = {
    "wte": (VOCAB, WIDTH),
    "wpe": (PLACES, WIDTH),
    "ln_1.weight": (WIDTH,),
    "ln_1.bias": (WIDTH,),
    "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
    "attn.c_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "ln_2.bias": (WIDTH,),
    "mlp.c_fc.weight": (WIDTH, UNITS),
    "mlp.c_fc.bias": (UNITS,),
    "mlp.c_proj.weight": (UNITS, WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
    "ln_f.weight": (WIDTH,),
    "ln_f.bias": (WIDTH,),
}


def numbers(shape, salt):
    """Numbers that look random and are not."""
    n = math.prod(shape)
    values = [math.sin(12.9898 * (i + 1) + 78.233 * salt) for i in range(n)]
    return np.array(values).reshape(shape)


def weights(salt=0):
    made = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        made[name] = 0.7 * numbers(shape, number + 100 * salt)
        if name in ("ln_1.weight", "ln_2.weight", "ln_f.weight"):
            made[name] = 1 + 0.3 * made[name]
        if name.startswith("attn.c_proj"):
            made[name] = np.zeros(shape)
    return made


def lora_start(shape):
    """What the adapter's first matrix begins with; in 64ths, since peft makes it in 32 bits."""
    return np.round(32 * numbers(shape, 7)) / 64


# ---- the model, one position at a time: without attention no position sees another ----


def norm(x, gain, bias):
    centered = x - x.mean()
    return centered / math.sqrt((centered**2).mean() + 1e-5) * gain + bias


def norm_backward(x, gain, dy):
    n = len(x)
    centered = x - x.mean()
    deviation = math.sqrt((centered**2).mean() + 1e-5)
    unit = centered / deviation
    d = dy * gain
    return (d - d.sum() / n - unit * (d * unit).sum() / n) / deviation


C = math.sqrt(2 / math.pi)


def gelu(u):
    return 0.5 * u * (1 + np.tanh(C * (u + 0.044715 * u**3)))


def gelu_slope(u):
    t = np.tanh(C * (u + 0.044715 * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t**2) * C * (1 + 3 * 0.044715 * u**2)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def read(w, token, place):
    """The state in front of the MLP, what enters it, its units before and after the activation."""
    x = w["wte"][token] + w["wpe"][place]
    h = norm(x, w["ln_2.weight"], w["ln_2.bias"])
    u = h @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
    return x, h, u, gelu(u)


def answer(w, x, a):
    """The state behind the MLP, and the distribution of the next token."""
    y = x + a @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    return y, softmax(norm(y, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte"].T)


def units_gradient(w, x, a, d_logits):
    """Of the units: what a change of the logits comes from."""
    y, _ = answer(w, x, a)
    dy = norm_backward(y, w["ln_f.weight"], d_logits @ w["wte"])
    return dy, w["mlp.c_proj.weight"] @ dy


def nll_gradients(w, batch):
    """Of the mean token loss over a batch: with respect to c_fc and c_proj."""
    fc, proj = np.zeros((WIDTH, UNITS)), np.zeros((UNITS, WIDTH))
    count = sum(len(text) - 1 for text in batch)
    for text in batch:
        for place in range(len(text) - 1):
            x, h, u, a = read(w, text[place], place)
            _, p = answer(w, x, a)
            d_logits = p.copy()
            d_logits[text[place + 1]] -= 1
            dy, da = units_gradient(w, x, a, d_logits / count)
            proj += np.outer(a, dy)
            fc += np.outer(h, da * gelu_slope(u))
    return {"mlp.c_fc.weight": fc, "mlp.c_proj.weight": proj}


# ---- RepSelect ----

MLP = ("mlp.c_fc.weight", "mlp.c_proj.weight")


def adapted(w, adapter):
    """The weights with the adapter added: W + (B A) transposed, for a matrix that is stored [in, out]."""
    return w | {name: w[name] + (B @ A).T for name, (A, B) in adapter.items()}


def evened(G):
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    U, S, V = U[:, :RANK], S[:RANK], Vt[:RANK].T
    s = S / S.min()
    G = G - (G @ V - (G @ V) / s) @ V.T
    T = G.T - (G.T @ U - (G.T @ U) / s) @ U.T
    return T.T


def repselect():
    w = weights()
    batches = [TEXTS[:2], TEXTS[2:]]
    adapter = {}
    for name in MLP:
        fan_in, fan_out = w[name].shape
        adapter[name] = (lora_start((LORA_RANK, fan_in)), np.zeros((fan_out, LORA_RANK)))
    for batch in batches:
        gradients = nll_gradients(adapted(w, adapter), batch)
        for name, (A, B) in adapter.items():
            d = gradients[name].T  # [out, in]
            adapter[name] = (A - LORA_RATE * B.T @ d, B - LORA_RATE * d @ A.T)
    total = dict.fromkeys(MLP, 0)
    for batch in batches:
        gradients = nll_gradients(adapted(w, adapter), batch)
        total = {name: total[name] - gradients[name] for name in MLP}
    return {name: w[name] - EPOCHS * RATE * evened(total[name]) for name in MLP}


# ---- neurons ----


def integrated_gradients(text):
    w = weights()
    score = np.zeros(UNITS)
    for place in range(len(text) - 1):
        x, _, _, a = read(w, text[place], place)
        gold = text[place + 1]
        for i in range(1, STEPS + 1):
            scaled = a * i / STEPS
            _, p = answer(w, x, scaled)
            d_logits = -p[gold] * p
            d_logits[gold] += p[gold]
            score += a / STEPS * units_gradient(w, x, scaled, d_logits)[1]
    return score


def gradient_times_activation(text):
    w = weights()
    score = np.zeros(UNITS)
    for place in range(len(text) - 1):
        x, _, _, a = read(w, text[place], place)
        _, p = answer(w, x, a)
        d_logits = -p
        d_logits[text[place + 1]] += 1
        score += a * units_gradient(w, x, a, d_logits)[1]
    return score


def ranked(scores):
    counts, totals = [0] * UNITS, [0.0] * UNITS
    for score in scores:
        for unit in range(UNITS):
            totals[unit] += score[unit]
            counts[unit] += bool(score[unit] > 0 and score[unit] >= SHARE * max(score))
    order = sorted(range(UNITS), key=lambda unit: (-counts[unit], -totals[unit]))
    return [unit for unit in order if counts[unit]]


# ---- UNDO ----


def draws():
    """What stands for random numbers in [0, 1); one half makes no noise, so that attention adds nothing."""
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        made[name] = (1 + numbers(shape, 50 + i)) / 2
        if name.startswith("attn.c_proj"):
            made[name] = np.full(shape, 0.5)
    return made


def student():
    w, made = weights(), {}
    for name, u in draws().items():
        noise = np.zeros(u.shape)
        if u.ndim == 2:
            noise = math.sqrt(6 / sum(u.shape)) * (2 * u - 1)
        made[name] = (1 - ALPHA) * w[name] + ALPHA * BETA * noise
    return made


def distance(teacher, pupil):
    """The mean of KL(teacher || student) over all positions with a next token."""
    total, count = 0.0, 0
    for text in TEXTS:
        for place in range(len(text) - 1):
            distributions = []
            for w in (teacher, pupil):
                x, _, _, a = read(w, text[place], place)
                distributions.append(answer(w, x, a)[1])
            p, q = distributions
            total += (p * np.log(p / q)).sum()
            count += 1
    return total / count


# ---- directions ----


def updates():
    """Two recorded updates of all weights."""
    return [
        {name: 0.1 * numbers(shape, 20 * k + i) for i, (name, shape) in enumerate(SHAPES.items())}
        for k in (1, 2)
    ]


def top_part(update):
    """The numbers of largest magnitude, one after the other."""
    flat = update.flatten()
    kept = np.zeros(flat.shape)
    for i in sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: max(1, round(TOP * len(flat)))]:
        kept[i] = flat[i]
    return kept.reshape(update.shape)


def subtracted(part):
    w = weights()
    for update in updates():
        w = {name: w[name] - SCALE * part(update[name]) for name in w}
    return {name: w[name] for name in ("wte", *MLP)}


def everything():
    ig, ga = (
        [integrated_gradients(text) for text in TEXTS],
        [gradient_times_activation(text) for text in TEXTS],
    )
    made = {
        "repselect": repselect(),
        "integrated gradients": {"scores": np.array(ig), "ranked": ranked(ig)},
        "gradient x activation": {"scores": np.array(ga), "ranked": ranked(ga)},
        "student": student(),
        "distance": distance(weights(), student()),
        "all updates": subtracted(np.array),
        "top updates": subtracted(top_part),
    }
    return json.loads(json.dumps(made, default=np.ndarray.tolist))


if __name__ == "__main__":
    STORED.write_text(json.dumps(everything(), indent=1) + "\n")
