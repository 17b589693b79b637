import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** Sizes of the kernels: one workgroup to a row; on a CPU one of few invocations, since barriers are dear. */
function plan(x: Tensor) {
  const n = x.shape.at(-1)!;
  const rows = n === 0 ? 0 : x.size / n;
  const isWide = n % 4 === 0;
  const WG = x.device.info.isSoftware ? 8 : n > 1024 ? 256 : 64;
  return {
    params: { rows, cols: isWide ? n / 4 : n }, constants: { WG },
    conditions: isWide ? ["vec4" as const] : [], workgroups: [rows] as [number],
  };
}

/**
 * exp(x) / sum(exp(x)), the sum over the last dimension.
 *
 * @param x  f32 [..., N]; entries may be -Infinity, but not all of a row
 * @returns f32 [..., N], rows adding up to 1; dx = y * (dy - sum(dy * y))
 * @throws ShapeError for a scalar
 *
 * Numerics  the row's maximum is subtracted first; sums in f32.
 * Source    Milakov & Gimelshein 2018 (arXiv 1805.02867): maximum and sum in one pass.
 */
export const softmax = defineOp({
  name: "softmax",
  forward(ctx, x: Tensor): Tensor {
    check(x.shape.length > 0, "softmax", "x", "[..., N]", x);
    const y = x.device.empty(x.shape);
    launch("norm/softmax", { entry: "softmax", bind: { x, y }, ...plan(x) });
    ctx.save({ y });
    return y;
  },
  backward({ y }: { y: Tensor }, [dy]) {
    if (!dy) return [];
    const dx = y.device.empty(y.shape);
    launch("norm/softmax", { entry: "softmax_backward", bind: { weight: y, dy, dx }, ...plan(y) });
    return [dx];
  },
});
