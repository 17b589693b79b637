/** What is added to the loss to keep the experts of a router evenly loaded, and its logits small. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";
import { router, SCORES, type RouterScore } from "./router.ts";

const WG = 64;
const groupsFor = (count: number): [number] => [Math.ceil(count / WG)];
const isCount = (n: number, most: number): boolean => Number.isInteger(n) && n >= 1 && n <= most;

/**
 * How often each expert is among the K largest logits of a token, per sequence; ties go to the lowest number.
 *
 * Neither the correction bias nor groups enter: these are the choices that the scores alone would make.
 * Counts of several ranks or micro-batches may be added before `router_aux_loss` reads them.
 *
 * @param logits  f32 [S * L, E], one sequence after the other
 * @param earlier u32 [S, E] to add to, or null
 * @returns u32 [S, E]
 * @throws ShapeError when the sequences do not divide the tokens, or for earlier counts of another shape
 */
export const router_aux_counts = defineOp({
  name: "router_aux_counts",
  forward(
    _ctx, logits: Tensor, { topk, sequences }: { topk: number; sequences: number },
    earlier: Tensor | null = null,
  ): Tensor {
    const name = "router_aux_counts";
    const { device } = logits;
    check(logits.shape.length === 2, name, "logits", "[S * L, E]", logits);
    const [T, E] = logits.shape as [number, number];
    check(isCount(topk, E), name, "topk", `from 1 to ${E}`, topk);
    check(
      Number.isInteger(sequences) && sequences >= 0 && (sequences > 0 ? T % sequences === 0 : T === 0), name,
      "sequences", `a divisor of ${T} tokens`, sequences);
    const counts = device.zeros([sequences, E], "u32");
    if (earlier) {
      check(earlier.shape.join() === counts.shape.join(), name, "earlier", `[${sequences}, ${E}]`, earlier);
      counts.copyFrom(earlier);
    }
    const [, topk_idx] = router(logits, device.zeros([E]), {
      topk, n_group: 1, topk_group: 1, norm_topk_prob: false, scaling: 1,
    });
    launch("moe/expert_load", {
      bind: { topk_idx: topk_idx!, counts },
      params: { choices: T * topk, per_row: Math.max((T / sequences) * topk, 1), experts: E },
      workgroups: groupsFor(T * topk),
    });
    return counts;
  },
});

export interface AuxLossOptions {
  readonly coeff: number;
  /** Default: sigmoid. */
  readonly score?: RouterScore;
  /**
   * Tokens of a sequence in one micro-batch whose choices `counts` holds, on all ranks that it was added up
   * over; default: L. Counts of several micro-batches need nothing else: only their shares matter.
   */
  readonly tokens?: number;
}

/**
 * Load balance loss of these logits, the mean over sequences: coeff * E / tokens * sum_e f_e sum_t p_te,
 * where f_e = counts_e / sum of counts and p_te = s_te / (sum_f s_tf + 1e-20). With even shares it is coeff.
 *
 * The counts are constant for the gradient. If they were added up over ranks, this is one rank's share of the
 * loss, and the sum over the ranks is all of it.
 *
 * @param logits  f32 [S * L, E]
 * @param counts  u32 [S, E], from `router_aux_counts`
 * @returns f32 scalar []; 0 without tokens
 * @throws ShapeError when the counts do not fit the logits
 */
export const router_aux_loss = defineOp({
  name: "router_aux_loss",
  forward(ctx, logits: Tensor, counts: Tensor, options: AuxLossOptions): Tensor {
    const name = "router_aux_loss";
    const { device } = logits;
    check(logits.shape.length === 2, name, "logits", "[S * L, E]", logits);
    const [T, E] = logits.shape as [number, number];
    const [S = 0] = counts.shape;
    check(
      counts.shape.length === 2 && counts.shape[1] === E && (S > 0 ? T % S === 0 : T === 0), name, "counts",
      `[S, ${E}] with S a divisor of ${T}`, counts);
    const { tokens = T / Math.max(S, 1), score = "sigmoid" } = options;
    check(tokens > 0 || T === 0, name, "tokens", "above 0", tokens);
    const params = {
      tokens: T, seqlen: Math.max(T / Math.max(S, 1), 1), experts: E,
      factor: T > 0 ? (options.coeff * E) / (tokens * S) : 0,
    };
    const constants = { SCORE: SCORES[score] };
    const [value, weight, inverse] = [device.empty([T]), device.empty([T]), device.empty([T])];
    const loss = device.empty([]);
    launch("moe/router_aux_loss", {
      entry: "terms", bind: { logits, counts, value, weight, inverse }, params, constants,
      workgroups: groupsFor(T),
    });
    launch("moe/router_aux_loss", { entry: "total", bind: { value, loss }, params, workgroups: [1] });
    ctx.save({ logits, counts, value, weight, inverse, params, constants });
    return loss;
  },
  backward({ logits, counts, value, weight, inverse, params, constants }, [dloss]) {
    if (!dloss) return [];
    const dlogits = logits.device.empty(logits.shape);
    launch("moe/router_aux_loss", {
      entry: "gradient", bind: { logits, counts, value, weight, inverse, dloss, dlogits }, params, constants,
      workgroups: groupsFor(logits.size),
    });
    return [dlogits];
  },
});

/**
 * Keeps the logits small: coeff / tokens * sum_t (log sum_e exp(logits_te))^2.
 *
 * @param logits  f32 [T, E]
 * @param options tokens: those of all ranks together, of whose loss this is a share; default: T
 * @returns f32 scalar []; 0 without tokens
 */
export const router_z_loss = defineOp({
  name: "router_z_loss",
  forward(ctx, logits: Tensor, options: { readonly coeff: number; readonly tokens?: number }): Tensor {
    const { device } = logits;
    check(logits.shape.length === 2, "router_z_loss", "logits", "[T, E]", logits);
    const [T, E] = logits.shape as [number, number];
    check(E >= 1, "router_z_loss", "logits", "[T, E] with an expert", logits);
    const { coeff, tokens = T } = options;
    check(tokens > 0 || T === 0, "router_z_loss", "tokens", "above 0", tokens);
    const params = { tokens: T, experts: E, factor: T > 0 ? coeff / tokens : 0 };
    const z = device.empty([T]);
    const loss = device.empty([]);
    launch("moe/router_z_loss", { entry: "terms", bind: { logits, z }, params, workgroups: groupsFor(T) });
    launch("moe/router_z_loss", { entry: "total", bind: { z, loss }, params, workgroups: [1] });
    ctx.save({ logits, z, params });
    return loss;
  },
  backward({ logits, z, params }, [dloss]) {
    if (!dloss) return [];
    const dlogits = logits.device.empty(logits.shape);
    launch("moe/router_z_loss", {
      entry: "gradient", bind: { logits, z, dloss, dlogits }, params, workgroups: groupsFor(logits.size),
    });
    return [dlogits];
  },
});
