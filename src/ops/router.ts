import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/**
 * What a router makes of the logits of a token: softmax over all experts, or over the chosen ones alone.
 */
export type RouterScore = "sigmoid" | "softmax" | "softmax_chosen" | "sqrtsoftplus";
/** Their numbers in shaders/lib/router_score.wgsl. */
export const SCORES: Readonly<Record<RouterScore | "logits", number>> = {
  sigmoid: 0, softmax: 1, softmax_chosen: 1, logits: 2, sqrtsoftplus: 3,
};

/** How the experts of a token are weighted. */
export interface WeightOptions {
  /** Default: sigmoid. */
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
  /** How many of its best experts make a group's score: 2, unless given; K / topk_group elsewhere. */
  readonly group_best?: number;
  /** What the bias is added to for the choice: the score (of softmax_chosen: the logit), or the logit. */
  readonly choice?: "score" | "logits";
}

const WG = 64;
const groupsFor = (count: number): [number] => [Math.ceil(count / WG)];
const isCount = (n: number, most: number): boolean => Number.isInteger(n) && n >= 1 && n <= most;

/**
 * Chooses experts: the K largest of s + bias among the experts of the best groups, weighted by s, where s is
 * the score of a logit.
 *
 * A group's score is the sum of its `group_best` largest s + bias. Ties go to the lowest number. Weights are
 * s / (sum over the chosen + 1e-20) * scaling with `norm_topk_prob`, else s * scaling. Gradients flow to the
 * logits through the weights alone.
 *
 * @param logits  f32 [T, E]
 * @param bias    f32 [E], for the choice only
 * @returns topk_weight f32 [T, K] and topk_idx u32 [T, K], experts ascending
 * @throws ShapeError for a bias of another width, n_group that does not divide E, fewer than K experts to
 *   choose from, or softmax over one chosen expert, whose weight would always be 1
 */
export const router = defineOp({
  name: "router",
  forward(ctx, logits: Tensor, bias: Tensor, options: RouterOptions): [Tensor, Tensor] {
    const { topk, n_group, topk_group, group_best = 2, choice = "score", score = "sigmoid" } = options;
    check(logits.shape.length === 2, "router", "logits", "[T, E]", logits);
    const [T, E] = logits.shape as [number, number];
    check(bias.shape.length === 1 && bias.shape[0] === E, "router", "bias", `[${E}]`, bias);
    check(isCount(n_group, E) && E % n_group === 0, "router", "n_group", `a divisor of ${E}`, n_group);
    check(isCount(topk_group, n_group), "router", "topk_group", `from 1 to ${n_group}`, topk_group);
    check(
      n_group === 1 || isCount(group_best, Infinity), "router", "group_best", "a whole number above 0",
      group_best);
    const candidates = (E / n_group) * topk_group;
    check(isCount(topk, candidates), "router", "topk", `from 1 to ${candidates}`, topk);
    checkChosen("router", topk, score);

    const topk_weight = logits.device.empty([T, topk], "f32");
    const topk_idx = logits.device.empty([T, topk], "u32");
    const layout = arrange(logits, n_group);
    const { WG: width, LANES } = layout;
    const workgroups = Math.ceil((T * LANES) / width);
    const keys = logits.device.empty([workgroups * (width / LANES) * E], "u32");
    const chosenBy = choice === "logits" || score === "softmax_chosen" ? "logits" : score;
    launch("moe/router", {
      bind: { logits, bias, keys, topk_weight, topk_idx },
      params: { ...weighing(logits, topk, options), topk_group, group_best },
      constants: { ...layout, CHOICE: SCORES[chosenBy], SCORE: SCORES[score] },
      workgroups: [workgroups],
    });
    ctx.save({ logits, topk_idx, options });
    return [topk_weight, topk_idx];
  },
  backward(saved: { logits: Tensor; topk_idx: Tensor; options: WeightOptions }, [dweight]) {
    return dweight ? [weightGradient(saved.logits, saved.topk_idx, dweight, saved.options)] : [];
  },
});

/**
 * The weights that `router` gives to experts that are chosen already, from the logits as they are now.
 *
 * @param logits    f32 [T, E]
 * @param topk_idx  u32 [T, K], different experts of a token
 * @returns f32 [T, K]
 * @throws ShapeError for choices of other tokens, or softmax over one chosen expert
 */
export const router_weights = defineOp({
  name: "router_weights",
  forward(ctx, logits: Tensor, topk_idx: Tensor, options: WeightOptions): Tensor {
    const name = "router_weights";
    check(logits.shape.length === 2, name, "logits", "[T, E]", logits);
    const [T, E] = logits.shape as [number, number];
    const topk = topk_idx.shape[1] ?? 0;
    check(
      topk_idx.shape.length === 2 && topk_idx.shape[0] === T && isCount(topk, E), name, "topk_idx",
      `[${T}, K] with K from 1 to ${E}`, topk_idx);
    checkChosen(name, topk, options.score);
    const topk_weight = logits.device.empty([T, topk]);
    launch("moe/router_weights", {
      bind: { logits, topk_idx, topk_weight }, params: weighing(logits, topk, options),
      constants: { SCORE: SCORES[options.score ?? "sigmoid"] }, workgroups: groupsFor(T),
    });
    ctx.save({ logits, topk_idx, options });
    return topk_weight;
  },
  backward({ logits, topk_idx, options }, [dweight]) {
    return dweight ? [weightGradient(logits, topk_idx, dweight, options)] : [];
  },
});

function checkChosen(op: string, topk: number, score: RouterScore = "sigmoid"): void {
  check(
    topk > 1 || score !== "softmax_chosen", op, "topk", "above 1 for softmax_chosen, whose weight would be 1",
    topk);
}

function weighing(logits: Tensor, topk: number, { score, norm_topk_prob, scaling }: WeightOptions) {
  const [tokens, experts] = logits.shape as [number, number];
  return { tokens, experts, topk, normalise: norm_topk_prob || score === "softmax_chosen" ? 1 : 0, scaling };
}

function weightGradient(logits: Tensor, topk_idx: Tensor, dweight: Tensor, options: WeightOptions): Tensor {
  const dlogits = logits.device.zeros(logits.shape);
  launch("moe/router_backward", {
    bind: { logits, topk_idx, dweight, dlogits },
    params: weighing(logits, topk_idx.shape[1]!, options),
    constants: { SCORE: SCORES[options.score ?? "sigmoid"] }, workgroups: groupsFor(logits.shape[0]!),
  });
  return dlogits;
}

/** How invocations share the router's work: overrides of its kernel. */
interface Arrangement {
  readonly WG: number;
  readonly LANES: number;
  readonly BLOCKS: number;
  readonly GROUPS: number;
  readonly WORDS: number;
}

/**
 * How invocations share the work. Enough of them to fill a GPU even for one token, but one per token on
 * software adapters, where they would only wait for each other. The block count balances K rounds of BLOCKS +
 * E / BLOCKS loads.
 */
function arrange(logits: Tensor, n_group: number): Arrangement {
  const [T, E] = logits.shape as [number, number];
  const powerOfTwo = (x: number): number => 2 ** Math.round(Math.log2(Math.max(x, 1)));
  const LANES = logits.device.info.isSoftware ? 1 : Math.min(powerOfTwo(16384 / Math.max(T, 1)), 32);
  const BLOCKS = Math.max(powerOfTwo(Math.sqrt(E)), LANES);
  const WORDS = Math.ceil(E / 32);
  const bytesPerToken = 4 * (BLOCKS + WORDS + n_group);
  // Invocations without a token repeat the last one: no more of them than a vector register holds.
  let width = Math.min(WG, Math.max(LANES, 8, 2 ** Math.ceil(Math.log2(Math.max(T, 1)))));
  while (width > LANES && (width / LANES) * bytesPerToken > 16384) width /= 2;
  return { WG: width, LANES, BLOCKS, GROUPS: n_group, WORDS };
}
