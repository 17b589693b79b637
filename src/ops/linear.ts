import { check } from "../tensor/check.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { linear_blocks, orBlocks } from "./block_linear.ts";
import { product, sumRows, vectorKernel, vectorProduct } from "./gemm.ts";
import { defineOp } from "./op.ts";

/**
 * y = x W^T + bias.
 *
 * @param x       f32 [..., K]
 * @param weight  f32 [N, K], or block-quantised (`quantize`): then without a gradient
 * @param bias    f32 [N], or null
 * @returns f32 [..., N]
 * @throws ShapeError when the widths differ
 */
export const linear = orBlocks(defineOp({
  name: "linear",
  forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | null): Tensor {
    check(x.shape.length >= 1, "linear", "x", "[..., K]", x);
    const K = x.shape.at(-1)!;
    check(weight.shape.length === 2 && weight.shape[1] === K, "linear", "weight", `[N, ${K}]`, weight);
    const N = weight.shape[0]!;
    if (bias) check(bias.shape.length === 1 && bias.shape[0] === N, "linear", "bias", `[${N}]`, bias);
    const rows = sizeOf(x.shape.slice(0, -1));
    const y = x.device.empty([...x.shape.slice(0, -1), N]);
    ctx.save({ x, weight });
    const few = vectorKernel(x, rows);
    if (few) vectorProduct(few, x, weight, bias, y);
    else {
      product({
        m: rows, n: N, k: K, a: { tensor: x, row: K, col: 1 }, b: { tensor: weight, row: 1, col: K },
        c: { tensor: y, row: N }, bias,
      });
    }
    return y;
  },
  backward({ x, weight }: { x: Tensor; weight: Tensor }, [dy], needs) {
    if (!dy) return [];
    const [N, K] = weight.shape as [number, number];
    const rows = sizeOf(x.shape.slice(0, -1));
    const dx = needs[0] ? x.device.empty(x.shape) : null;
    if (dx) {
      product({
        m: rows, n: K, k: N, a: { tensor: dy, row: N, col: 1 }, b: { tensor: weight, row: K, col: 1 },
        c: { tensor: dx, row: K },
      });
    }
    const dweight = needs[1] ? x.device.empty(weight.shape) : null;
    if (dweight) {
      product({
        m: N, n: K, k: rows, a: { tensor: dy, row: 1, col: N }, b: { tensor: x, row: K, col: 1 },
        c: { tensor: dweight, row: K },
      });
    }
    const dbias = needs[2] ? x.device.empty([N]) : null;
    if (dbias) sumRows(dy, rows, N, dbias);
    return [dx, dweight, dbias];
  },
}), (x, { codes, scales, format }, bias) => linear_blocks(x, codes, scales, bias, { format }));
