/** What a router makes of the logits of one token. */
export type RouterScore = "sigmoid" | "softmax" | "softmax_chosen" | "sqrtsoftplus";

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const softplus = (x: number): number => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

/** Indices of the `count` largest values, largest first, ties to the lowest index. */
export function largest(values: ArrayLike<number>, count: number): number[] {
  const order = Array.from(values, (_, i) => i);
  return order.sort((a, b) => values[b]! - values[a]! || a - b).slice(0, count);
}

/** Scores of one token; both softmaxes as exp(x - top), for whoever divides by a sum anyway. */
export function scoresOf(x: Float64Array, score: RouterScore, top = Math.max(...x)): Float64Array {
  if (score === "sigmoid") return x.map(sigmoid);
  if (score === "sqrtsoftplus") return x.map((value) => Math.sqrt(softplus(value)));
  return x.map((value) => Math.exp(value - top));
}

/** Derivatives of `scoresOf`. */
export function slopesOf(x: Float64Array, score: RouterScore, top = Math.max(...x)): Float64Array {
  if (score === "sigmoid") return x.map((value) => sigmoid(value) * sigmoid(-value));
  const s = scoresOf(x, score, top);
  return score === "sqrtsoftplus" ? x.map((value, e) => sigmoid(value) / (2 * s[e]!)) : s;
}
