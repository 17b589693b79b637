import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** Few invocations per slab on software adapters, where each further one makes a barrier dearer. */
const slabOf = (x: Tensor): { WG: number; EACH: number } =>
  x.device.info.isSoftware ? { WG: 8, EACH: 512 } : { WG: 64, EACH: 16 };

/**
 * sqrt of the sum of squares over all elements of all tensors, in a fixed order: one launch per tensor and
 * one for the rest.
 *
 * @param grads  f32 tensors of any shapes, at least one
 * @returns f32 [1]
 * @throws UsageError for an empty list
 */
export const global_norm = defineOp({
  name: "global_norm",
  forward(_ctx, grads: readonly Tensor[]): Tensor {
    const first = grads[0];
    if (!first) throw new UsageError("global_norm: expected at least one tensor, found none.");
    const constants = slabOf(first);
    const parts = grads.map((x) => {
      const isWide = x.size % 4 === 0;
      const count = isWide ? x.size / 4 : x.size;
      const slabs = Math.ceil(count / (constants.WG * constants.EACH));
      return { x, count, slabs, conditions: isWide ? ["vec4" as const] : [] };
    });
    const total = parts.reduce((sum, { slabs }) => sum + slabs, 0);
    const partial = first.device.empty([total]);
    let at = 0;
    for (const { x, count, slabs, conditions } of parts) {
      launch("optim/global_norm", {
        entry: "squares", bind: { x, partial }, params: { count, first: at, max_norm: 0 },
        constants, conditions, workgroups: [slabs],
      });
      at += slabs;
    }
    const norm = first.device.empty([1]);
    launch("optim/global_norm", {
      entry: "total", bind: { partial, norm }, params: { count: total, first: 0, max_norm: 0 },
      constants: { WG: first.device.info.isSoftware ? 8 : 256 }, workgroups: [1],
    });
    return norm;
  },
});

/**
 * min(1, max_norm / (norm + 1e-6)): the factor that clips gradients of this norm; -1, with which nothing is
 * updated, where the norm or the loss is not finite.
 *
 * @param norm      f32 [1]
 * @param max_norm  above 0
 * @param loss      f32 [] or [1], or null
 * @returns f32 [1]
 */
export const clip_scale = defineOp({
  name: "clip_scale",
  forward(_ctx, norm: Tensor, max_norm: number, loss: Tensor | null = null): Tensor {
    check(norm.size === 1, "clip_scale", "norm", "[1]", norm);
    if (loss) check(loss.size === 1, "clip_scale", "loss", "[1]", loss);
    const scale = norm.device.empty([1]);
    launch("optim/global_norm", {
      entry: "clip", bind: { norm, scale, loss: loss ?? norm.device.zeros([1]) },
      params: { count: 1, first: 0, max_norm },
      workgroups: [1],
    });
    return scale;
  },
});
