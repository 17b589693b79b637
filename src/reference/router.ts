import { ndarray, type NdArray } from "../tensor/ndarray.ts";
import { largest, type RouterScore, scoresOf, slopesOf } from "./router_score.ts";

type Grads = readonly (NdArray | null)[];

/** How the experts of a token are weighted. */
export interface WeightOptions {
  readonly score?: RouterScore;
  /** Whether the weights of a token are divided by their sum; with softmax_chosen they always are. */
  readonly norm_topk_prob: boolean;
  /** Factor on every weight. */
  readonly scaling: number;
}

/** How a router chooses experts and scales their weights. */
export interface RouterOptions extends WeightOptions {
  /** Experts per token, K. */
  readonly topk: number;
  /** Groups of E / n_group consecutive experts. */
  readonly n_group: number;
  /** Groups of a token whose experts may be chosen. */
  readonly topk_group: number;
  /** How many of its best experts make a group's score. */
  readonly group_best?: number;
  readonly choice?: "score" | "logits";
}

/** What the bias is added to when experts are chosen. */
function choiceOf(x: Float64Array, { score = "sigmoid", choice = "score" }: RouterOptions): Float64Array {
  if (choice === "logits" || score === "softmax_chosen") return x.slice();
  const s = scoresOf(x, score);
  const sum = score === "softmax" ? s.reduce((a, b) => a + b, 0) : 1;
  return s.map((value) => value / sum);
}

/**
 * Experts and weights of each token: the K largest of s + bias within the best groups, weighted by the score
 * s of the logits.
 *
 * @param logits  [T, E]
 * @param bias    [E], for the choice only
 * @returns topk_weight [T, K] and topk_idx [T, K] in ascending expert order
 */
export function router(logits: NdArray, bias: NdArray, options: RouterOptions): [NdArray, NdArray] {
  const { topk: K, n_group, topk_group, group_best = 2 } = options;
  const [T, E] = logits.shape as [number, number];
  const idx = ndarray([T, K]);
  for (let t = 0; t < T; t++) {
    const s = choiceOf(logits.data.subarray(t * E, (t + 1) * E), options);
    const biased = s.map((score, e) => score + bias.data[e]!);
    const width = E / n_group;
    const groupScore = Array.from({ length: n_group }, (_, g) => {
      const members = biased.subarray(g * width, (g + 1) * width);
      return largest(members, group_best).reduce((sum, i) => sum + members[i]!, 0);
    });
    const groups = new Set(largest(groupScore, topk_group));
    const candidates = Array.from(biased, (_, e) => e).filter((e) => groups.has(Math.floor(e / width)));
    const best = largest(candidates.map((e) => biased[e]!), K);
    idx.data.set(best.map((i) => candidates[i]!).sort((a, b) => a - b), t * K);
  }
  return [router_weights(logits, idx, options), idx];
}

/** Of one token: the scores of all its experts, those chosen, what they are divided by and over whom. */
function tokenOf(logits: NdArray, idx: NdArray, t: number, options: WeightOptions) {
  const { score = "sigmoid", norm_topk_prob } = options;
  const E = logits.shape[1]!;
  const K = idx.shape[1]!;
  const x = logits.data.subarray(t * E, (t + 1) * E);
  const chosen = Array.from(idx.data.subarray(t * K, (t + 1) * K));
  const normalise = norm_topk_prob || score === "softmax_chosen";
  const top = Math.max(...(normalise ? chosen.map((e) => x[e]!) : x));
  const s = scoresOf(x, score, top);
  const sumOf = (experts: number[]) => experts.reduce((sum, e) => sum + s[e]!, 0);
  const everyone = Array.from(s, (_, e) => e);
  const overAll = !normalise && score === "softmax";
  const divisor = normalise ? sumOf(chosen) + 1e-20 : overAll ? sumOf(everyone) : 1;
  const summed = normalise ? chosen : overAll ? everyone : [];
  return { s, slopes: slopesOf(x, score, top), chosen, divisor, summed };
}

/** Weights [T, K] of chosen experts topk_idx [T, K]: their scores, divided by a sum, times the scaling. */
export function router_weights(logits: NdArray, topk_idx: NdArray, options: WeightOptions): NdArray {
  const [T, K] = topk_idx.shape as [number, number];
  const weight = ndarray([T, K]);
  for (let t = 0; t < T; t++) {
    const { s, chosen, divisor } = tokenOf(logits, topk_idx, t, options);
    chosen.forEach((e, k) => (weight.data[t * K + k] = (s[e]! / divisor) * options.scaling));
  }
  return weight;
}

/** For w = scaling * s / S: ds_e = scaling * g_e / S, and for all that S sums -scaling * sum g s / S^2. */
export function router_weights_vjp(
  [dweight]: Grads, logits: NdArray, topk_idx: NdArray, options: WeightOptions,
): (NdArray | null)[] {
  const E = logits.shape[1]!;
  const [T, K] = topk_idx.shape as [number, number];
  const dlogits = ndarray(logits.shape);
  if (!dweight) return [dlogits, null, null];
  for (let t = 0; t < T; t++) {
    const { s, slopes, chosen, divisor, summed } = tokenOf(logits, topk_idx, t, options);
    const g = dweight.data.subarray(t * K, (t + 1) * K);
    const add = (e: number, ds: number) => (dlogits.data[t * E + e]! += options.scaling * ds * slopes[e]!);
    chosen.forEach((e, k) => add(e, g[k]! / divisor));
    const through = chosen.reduce((sum, e, k) => sum + g[k]! * s[e]!, 0) / divisor ** 2;
    for (const e of summed) add(e, -through);
  }
  return [dlogits, null, null];
}

/** As of `router_weights`: the choice has no gradient. */
export function router_vjp(
  grads: Grads, logits: NdArray, bias: NdArray, options: RouterOptions,
): (NdArray | null)[] {
  return router_weights_vjp(grads, logits, router(logits, bias, options)[1], options);
}
