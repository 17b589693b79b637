import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { largest } from "./router_score.ts";

type Grads = readonly (NdArray | null)[];

/** How a router chooses experts and scales their weights. */
export interface RouterOptions {
  /** Experts per token, K. */
  readonly topk: number;
  /** Groups of E / n_group consecutive experts. */
  readonly n_group: number;
  /** Groups of a token whose experts may be chosen. */
  readonly topk_group: number;
  /** Whether the weights of a token are divided by their sum. */
  readonly norm_topk_prob: boolean;
  /** Factor on every weight. */
  readonly scaling: number;
}

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/**
 * Experts and weights of each token: s = sigmoid(logits), the K largest of s + bias within the best groups,
 * weighted by s.
 *
 * @param logits  [T, E]
 * @param bias    [E], for the choice only
 * @returns topk_weight [T, K] and topk_idx [T, K] in ascending expert order
 */
export function router(logits: NdArray, bias: NdArray, options: RouterOptions): [NdArray, NdArray] {
  const { topk: K, n_group, topk_group, norm_topk_prob, scaling } = options;
  const [T, E] = logits.shape as [number, number];
  const weight = ndarray([T, K]);
  const idx = ndarray([T, K]);
  for (let t = 0; t < T; t++) {
    const s = logits.data.subarray(t * E, (t + 1) * E).map(sigmoid);
    const biased = s.map((score, e) => score + bias.data[e]!);
    const width = E / n_group;
    const groupScore = Array.from({ length: n_group }, (_, g) => {
      const members = biased.subarray(g * width, (g + 1) * width);
      return largest(members, 2).reduce((sum, i) => sum + members[i]!, 0);
    });
    const groups = new Set(largest(groupScore, topk_group));
    const candidates = Array.from(biased, (_, e) => e).filter((e) => groups.has(Math.floor(e / width)));
    const best = largest(candidates.map((e) => biased[e]!), K);
    const chosen = best.map((i) => candidates[i]!).sort((a, b) => a - b);
    const sum = norm_topk_prob ? chosen.reduce((total, e) => total + s[e]!, 0) + 1e-20 : 1;
    chosen.forEach((e, k) => {
      idx.data[t * K + k] = e;
      weight.data[t * K + k] = (s[e]! / sum) * scaling;
    });
  }
  return [weight, idx];
}

/** ds_e = scaling * (g_e - sum_f g_f s_f / S) / S with S the sum of the chosen; dlogit = ds * s * (1 - s). */
export function router_vjp(
  [dweight]: Grads, logits: NdArray, bias: NdArray, options: RouterOptions,
): (NdArray | null)[] {
  const { topk: K, norm_topk_prob, scaling } = options;
  const [T, E] = logits.shape as [number, number];
  const dlogits = ndarray(logits.shape);
  if (!dweight) return [dlogits, null, null];
  const [, idx] = router(logits, bias, options);
  for (let t = 0; t < T; t++) {
    const experts = idx.data.subarray(t * K, (t + 1) * K);
    const g = dweight.data.subarray(t * K, (t + 1) * K);
    const s = experts.map((e) => sigmoid(logits.data[t * E + e]!));
    const sum = norm_topk_prob ? s.reduce((a, b) => a + b, 0) + 1e-20 : 1;
    const mean = norm_topk_prob ? s.reduce((total, score, k) => total + (g[k]! * score) / sum, 0) : 0;
    experts.forEach((e, k) => {
      dlogits.data[t * E + e] = ((scaling * (g[k]! - mean)) / sum) * s[k]! * (1 - s[k]!);
    });
  }
  return [dlogits, null, null];
}
