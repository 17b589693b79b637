import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { columns, type MoePlan } from "./moe.ts";
import { defineOp } from "./op.ts";

const WG = 64;

interface Saved {
  readonly x: Tensor;
  readonly topk_weight: Tensor;
  readonly plan: MoePlan;
  /** x is max(h, 0)^2, and the gradient of h is due. */
  readonly squared: boolean;
}

/**
 * Rows in expert order times the weights of their choices: out[slot] = topk_weight[slot_token[slot]] *
 * x[slot]; zeros where a slot has no choice.
 *
 * Between the activation and the down projection of experts this is exact, since the projection is linear:
 * its result then need not be kept for the gradient of the weights.
 *
 * @param x            f32 [slots, D]
 * @param topk_weight  f32 [T, K]
 * @returns f32 [slots, D]; differentiable in x and topk_weight
 * @throws ShapeError for a plan of another size
 */
export const moe_weigh = defineOp({
  name: "moe_weigh",
  relu2: [0],
  forward(ctx, x: Tensor, topk_weight: Tensor, plan: MoePlan): Tensor {
    const rows = plan.slot_token.size;
    check(x.shape.length === 2 && x.shape[0] === rows, "moe_weigh", "x", `[${rows}, D]`, x);
    const choices = plan.token_slot.size;
    check(topk_weight.size === choices, "moe_weigh", "topk_weight", `of ${choices} choices`, topk_weight);
    const out = x.device.empty(x.shape);
    const { cols, conditions } = columns(x.shape[1]!, 1);
    launch("moe/weigh", {
      entry: "weigh", bind: { x, topk_weight, slot_token: plan.slot_token, out },
      params: { slots: rows, cols }, conditions, workgroups: [Math.ceil((rows * cols) / WG)],
    });
    ctx.save({ x, topk_weight, plan, squared: x.relu2Key !== null });
    return out;
  },
  backward({ x, topk_weight, plan, squared }: Saved, [dout]) {
    if (!dout) return [];
    const { device } = x;
    const dx = device.empty(x.shape);
    const dweight = plan.spare ? device.zeros(topk_weight.shape) : device.empty(topk_weight.shape);
    const [slots, D] = x.shape as [number, number];
    const { cols, conditions } = columns(D, 1);
    const LANES = device.info.isSoftware ? 1 : 32;
    launch("moe/weigh", {
      entry: "weigh_backward", bind: { x, topk_weight, slot_token: plan.slot_token, dout, dx, dweight },
      params: { slots, cols }, conditions: [...conditions, ...(squared ? ["squared" as const] : [])],
      constants: { LANES }, workgroups: [Math.ceil((slots * LANES) / WG)],
    });
    return [dx, dweight];
  },
});
