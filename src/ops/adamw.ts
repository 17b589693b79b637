import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { DTypeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;

/** A stretch of elements that belong to one parameter. */
export interface Stretch {
  /** Its first element, a multiple of 4. */
  readonly first: number;
  readonly size: number;
  /** Whether weight_decay applies to it. */
  readonly decays: boolean;
}

/**
 * Stretches cut into what one workgroup of `adamw` takes, on the device.
 * @returns u32 [slabs, 3]: first and end in units of 4 elements, and 1 for decay. A stretch whose size is no
 *   multiple of 4 counts up to the next: what lies there must be nobody's.
 */
export function stretchTable(device: Device, stretches: readonly Stretch[]): Tensor {
  const slab = WG * (device.info.isSoftware ? 8 : 2);
  const rows = stretches.flatMap(({ first, size, decays }) => {
    const end = Math.ceil((first + size) / 4);
    return Array.from({ length: Math.ceil(Math.ceil(size / 4) / slab) }, (_, i) =>
      [first / 4 + i * slab, Math.min(first / 4 + (i + 1) * slab, end), decays ? 1 : 0]);
  });
  return device.tensor(Uint32Array.from(rows.flat()), [rows.length, 3]);
}

/**
 * One AdamW step in place, for many parameters in one launch:
 * param -= lr * weight_decay * param, then param -= lr * mhat / (sqrt(vhat) + eps).
 *
 * @param param       f32 [n] with n a multiple of 4, changed: parameters side by side; grad, m and v have the
 *   same shape, m and v are changed
 * @param table       u32 [slabs, 3], of `stretchTable`; what no slab names stays as it is
 * @param hyper       f32 [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, 0. The kernel
 *   forms 1 - beta in f32, so the two corrections should be computed from the betas as rounded to f32.
 * @param grad_scale  f32 [1], multiplies the gradient first (a clip factor, or 1); negative: nothing changes
 * @throws ShapeError when the shapes differ; DTypeError for a table that is not u32
 */
export const adamw = defineOp({
  name: "adamw",
  mutates: [0, 2, 3],
  forward(
    _ctx, param: Tensor, grad: Tensor, m: Tensor, v: Tensor, table: Tensor, hyper: Tensor, grad_scale: Tensor,
  ): Tensor[] {
    check(param.shape.length === 1 && param.size % 4 === 0, "adamw", "param", "[a multiple of 4]", param);
    for (const [what, tensor] of [["grad", grad], ["m", m], ["v", v]] as const) {
      check(tensor.shape.join() === param.shape.join(), "adamw", what, `[${param.shape}]`, tensor);
    }
    check(table.shape.length === 2 && table.shape[1] === 3, "adamw", "table", "[slabs, 3]", table);
    if (table.dtype !== "u32") throw new DTypeError(`adamw: table must be u32, found ${table.dtype}.`);
    check(hyper.size === 8, "adamw", "hyper", "[8]", hyper);
    check(grad_scale.size === 1, "adamw", "grad_scale", "[1]", grad_scale);
    const slabs = table.shape[0]!;
    launch("optim/adamw", {
      bind: { param, grad, m, v, slabs: table, hyper, grad_scale }, params: { count: slabs },
      constants: { WG }, workgroups: [slabs],
    });
    return [];
  },
});
