import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { largest, type RouterScore, scoresOf, slopesOf } from "./router_score.ts";

type Grads = readonly (NdArray | null)[];

/** Choices of each expert per sequence: the K largest logits of every token, ties to the lowest number. */
export function router_aux_counts(
  logits: NdArray, { topk, sequences }: { topk: number; sequences: number }, earlier: NdArray | null = null,
): NdArray {
  const [T, E] = logits.shape as [number, number];
  const counts = ndarray([sequences, E], earlier?.data.slice());
  for (let t = 0; t < T; t++) {
    const s = Math.floor(t / (T / sequences));
    for (const e of largest(logits.data.subarray(t * E, (t + 1) * E), topk)) counts.data[s * E + e]! += 1;
  }
  return counts;
}

interface AuxLossOptions {
  readonly coeff: number;
  readonly score?: RouterScore;
  readonly tokens?: number;
}

/** Per token: c_e = coeff * E / (tokens * S) * n_e / sum of n; scores, their sum and sum_e c_e p_te. */
function termsOf(logits: NdArray, counts: NdArray, { coeff, score = "sigmoid", tokens }: AuxLossOptions) {
  const [T, E] = logits.shape as [number, number];
  const S = counts.shape[0]!;
  return Array.from({ length: T }, (_, t) => {
    const x = logits.data.subarray(t * E, (t + 1) * E);
    const row = Math.floor(t / (T / S));
    const n = counts.data.subarray(row * E, (row + 1) * E);
    const choices = n.reduce((a, b) => a + b, 0);
    const c = n.map((count) => (coeff * E * count) / choices / (tokens ?? T / S) / S);
    const s = scoresOf(x, score);
    const sum = s.reduce((a, b) => a + b, 0) + 1e-20;
    return { x, c, s, sum, mean: s.reduce((total, value, e) => total + (c[e]! * value) / sum, 0) };
  });
}

/**
 * Load balance loss, the mean over S sequences: coeff * E / tokens * sum_e n_e / sum(n) * sum_t p_te with
 * p_te = s_te / (sum_f s_tf + 1e-20).
 *
 * @param logits  [S * L, E]
 * @param counts  [S, E]
 * @returns scalar []
 */
export function router_aux_loss(logits: NdArray, counts: NdArray, options: AuxLossOptions): NdArray {
  return ndarray([], [termsOf(logits, counts, options).reduce((sum, { mean }) => sum + mean, 0)]);
}

/** With constant counts: ds_te = (c_e - sum_f c_f p_tf) / sum_f s_tf. */
export function router_aux_loss_vjp(
  [dloss]: Grads, logits: NdArray, counts: NdArray, options: AuxLossOptions,
): (NdArray | null)[] {
  const E = logits.shape[1]!;
  const dlogits = ndarray(logits.shape);
  termsOf(logits, counts, options).forEach(({ x, c, sum, mean }, t) => {
    slopesOf(x, options.score ?? "sigmoid").forEach((slope, e) => {
      dlogits.data[t * E + e] = (((dloss?.data[0] ?? 0) * (c[e]! - mean)) / sum) * slope;
    });
  });
  return [dlogits, null, null];
}

const logSumExp = (x: Float64Array): number => {
  const top = Math.max(...x);
  return top + Math.log(x.reduce((sum, value) => sum + Math.exp(value - top), 0));
};

/** coeff / tokens * sum_t (log sum_e exp(logits_te))^2 for logits [T, E]. */
export function router_z_loss(logits: NdArray, options: { coeff: number; tokens?: number }): NdArray {
  const [T, E] = logits.shape as [number, number];
  const loss = ndarray([]);
  for (let t = 0; t < T; t++) {
    loss.data[0]! += (options.coeff / (options.tokens ?? T)) *
      logSumExp(logits.data.subarray(t * E, (t + 1) * E)) ** 2;
  }
  return loss;
}

/** dlogit = coeff / tokens * 2 * z * softmax. */
export function router_z_loss_vjp(
  [dloss]: Grads, logits: NdArray, options: { coeff: number; tokens?: number },
): (NdArray | null)[] {
  const [T, E] = logits.shape as [number, number];
  const dlogits = ndarray(logits.shape);
  const factor = ((dloss?.data[0] ?? 0) * options.coeff) / (options.tokens ?? T);
  for (let t = 0; t < T; t++) {
    const x = logits.data.subarray(t * E, (t + 1) * E);
    const z = logSumExp(x);
    x.forEach((value, e) => (dlogits.data[t * E + e] = factor * 2 * z * Math.exp(value - z)));
  }
  return [dlogits, null];
}
