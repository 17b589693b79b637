import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/**
 * What a router makes of the logits of a token: softmax over all experts, or over the chosen ones alone.
 */
export type RouterScore = "sigmoid" | "softmax" | "softmax_chosen" | "sqrtsoftplus";
/** Their numbers in shaders/lib/router_score.wgsl. */
export const SCORES: Readonly<Record<RouterScore, number>> = {
  sigmoid: 0, softmax: 1, softmax_chosen: 1, sqrtsoftplus: 3,
};

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

const WG = 64;
const groupsFor = (count: number): [number] => [Math.ceil(count / WG)];
const isCount = (n: number, most: number): boolean => Number.isInteger(n) && n >= 1 && n <= most;

/**
 * Chooses experts: s = sigmoid(logits); the K largest of s + bias among the experts of the best groups,
 * weighted by s.
 *
 * A group's score is the sum of its two largest s + bias. Ties go to the lowest number. Weights are s / (sum
 * + 1e-20) * scaling with `norm_topk_prob`, else s * scaling. Gradients flow to the logits through the
 * weights alone.
 *
 * @param logits  f32 [T, E]
 * @param bias    f32 [E], for the choice only
 * @returns topk_weight f32 [T, K] and topk_idx u32 [T, K], experts ascending
 * @throws ShapeError for a bias of another width, n_group that does not divide E, or fewer than K experts to
 *   choose from
 */
export const router = defineOp({
  name: "router",
  forward(ctx, logits: Tensor, bias: Tensor, options: RouterOptions): [Tensor, Tensor] {
    const { topk, n_group, topk_group, scaling } = options;
    check(logits.shape.length === 2, "router", "logits", "[T, E]", logits);
    const [T, E] = logits.shape as [number, number];
    check(bias.shape.length === 1 && bias.shape[0] === E, "router", "bias", `[${E}]`, bias);
    check(isCount(n_group, E) && E % n_group === 0, "router", "n_group", `a divisor of ${E}`, n_group);
    check(isCount(topk_group, n_group), "router", "topk_group", `from 1 to ${n_group}`, topk_group);
    const candidates = (E / n_group) * topk_group;
    check(isCount(topk, candidates), "router", "topk", `from 1 to ${candidates}`, topk);

    const topk_weight = logits.device.empty([T, topk], "f32");
    const topk_idx = logits.device.empty([T, topk], "u32");
    const layout = arrange(logits, n_group);
    const { WG: width, LANES } = layout;
    const workgroups = Math.ceil((T * LANES) / width);
    const keys = logits.device.empty([workgroups * (width / LANES) * E], "u32");
    launch("moe/router", {
      bind: { logits, bias, keys, topk_weight, topk_idx },
      params: { tokens: T, experts: E, topk, topk_group, normalise: options.norm_topk_prob ? 1 : 0, scaling },
      constants: layout,
      workgroups: [workgroups],
    });
    ctx.save({ logits, topk_idx, options });
    return [topk_weight, topk_idx];
  },
  backward(saved: { logits: Tensor; topk_idx: Tensor; options: RouterOptions }, [dweight]) {
    if (!dweight) return [];
    const { logits, topk_idx } = saved;
    const { topk, norm_topk_prob, scaling } = saved.options;
    const [T, E] = logits.shape as [number, number];
    const dlogits = logits.device.zeros(logits.shape);
    launch("moe/router_backward", {
      bind: { logits, topk_idx, dweight, dlogits },
      params: { tokens: T, experts: E, topk, normalise: norm_topk_prob ? 1 : 0, scaling },
      workgroups: groupsFor(T),
    });
    return [dlogits];
  },
});

/** The overrides of the router's kernel. */
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
