import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** Rounds at which it ends in any case; a hundred are plenty for logits within some tens of each other. */
const ROUNDS = 1000;

/**
 * d0_t exp(logits_te) d1_e with factors so that every token's row sums to 1 / T and every expert's column to
 * 1 / E: its K largest entries per token load the experts about evenly. No gradient.
 *
 * @param logits  f32 [T, E]
 * @returns f32 [T, E]
 */
export const sinkhorn = defineOp({
  name: "sinkhorn",
  forward(_ctx, logits: Tensor): Tensor {
    const { device } = logits;
    const [T, E] = logits.shape as [number, number];
    check(logits.shape.length === 2 && E >= 1, "sinkhorn", "logits", "[T, E] with an expert", logits);
    const balanced = device.empty(logits.shape);
    launch("moe/sinkhorn", {
      bind: { logits, balanced, d0: device.empty([T]), d1: device.empty([E]) },
      params: { tokens: T, experts: E, rounds: ROUNDS }, workgroups: [T > 0 ? 1 : 0],
    });
    return balanced;
  },
});
