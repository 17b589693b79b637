import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;

/**
 * One AdamW step in place: param -= lr * weight_decay * param, then param -= lr * mhat / (sqrt(vhat) + eps).
 *
 * @param param       f32, any shape, changed; grad, m and v have the same shape, m and v are changed
 * @param hyper       f32 [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, 0. The kernel
 *   forms 1 - beta in f32, so the two corrections should be computed from the betas as rounded to f32.
 * @param grad_scale  f32 [1], multiplies the gradient first (a clip factor, or 1)
 * @param decay       whether weight_decay applies to this parameter
 * @throws ShapeError when the shapes differ
 */
export const adamw = defineOp({
  name: "adamw",
  mutates: [0, 2, 3],
  forward(
    _ctx, param: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    hyper: Tensor, grad_scale: Tensor, decay: boolean,
  ): Tensor[] {
    const expected = `[${param.shape.join(", ")}]`;
    for (const [what, tensor] of [["grad", grad], ["m", m], ["v", v]] as const) {
      check(tensor.shape.join() === param.shape.join(), "adamw", what, expected, tensor);
    }
    check(hyper.size === 8, "adamw", "hyper", "[8]", hyper);
    check(grad_scale.size === 1, "adamw", "grad_scale", "[1]", grad_scale);
    const EACH = param.device.info.isSoftware ? 8 : 2;
    const isWide = param.size % 4 === 0;
    const count = isWide ? param.size / 4 : param.size;
    launch("optim/adamw", {
      bind: { param, grad, m, v, hyper, grad_scale }, params: { count, decay: decay ? 1 : 0 },
      constants: { WG, EACH }, conditions: isWide ? ["vec4"] : [],
      workgroups: [Math.ceil(count / (WG * EACH))],
    });
    return [];
  },
});
