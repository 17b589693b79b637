import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { grouped_linear_blocks, orBlocks } from "./block_linear.ts";
import {
  type FloatDType, groupedTiles, product, productDType, productKernel, type ProductKernel, readsInVectors, tileRows,
  vectorProduct,
} from "./gemm.ts";
import { defineOp } from "./op.ts";

export interface GroupedLinearOptions {
  /** Which kernel computes it; default: the one that suits the adapter and the shape. */
  readonly kernel?: ProductKernel | "matvec" | "matvec_quad";
  /** Number format of the result; default: that of x and weight where both are the same half, or f32. */
  readonly out?: FloatDType;
}

interface Saved {
  readonly x: Tensor;
  readonly weight: Tensor;
  readonly offsets: Tensor;
  readonly options: GroupedLinearOptions;
}

const name = "grouped_linear";
/** Up to so many rows are taken one by one: experts then have about one row each. */
const FEW_ROWS = 8;

/**
 * y[s] = weight[e] x[s] for the rows offsets[e] <= s < offsets[e + 1] of every expert e.
 *
 * x and weight may be f32, f16 or bf16; sums are f32, and so are the gradients. The offsets are read on the GPU
 * only. The gradient of an expert without rows is exactly zero.
 *
 * @param x        [S, K], rows sorted by expert
 * @param weight   [E, N, K], or block-quantised (`quantize`): then without a gradient
 * @param offsets  u32 [E + 1], ascending from 0 to S
 * @returns [S, N]
 * @throws ShapeError when the widths or the number of experts differ
 */
export const grouped_linear = orBlocks(defineOp({
  name,
  halves: [0, 1],
  forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor, options: GroupedLinearOptions = {}): Tensor {
    check(x.shape.length === 2, name, "x", "[S, K]", x);
    const [S, K] = x.shape as [number, number];
    check(weight.shape.length === 3 && weight.shape[2] === K, name, "weight", `[E, N, ${K}]`, weight);
    const [E, N] = weight.shape as [number, number, number];
    check(offsets.shape.length === 1 && offsets.size === E + 1, name, "offsets", `[${E + 1}]`, offsets);
    const y = x.device.empty([S, N], productDType(x, weight, options.out));
    ctx.save({ x, weight, offsets, options });
    const few = x.device.info.isSoftware ? "matvec_quad" : "matvec";
    const wanted = options.kernel ?? (S <= FEW_ROWS && readsInVectors(x, weight) ? few : undefined);
    if (wanted === "matvec" || wanted === "matvec_quad") vectorProduct(wanted, x, weight, y, {}, offsets);
    else {
      const kernel = productKernel(x.device, wanted);
      product({
        m: S, n: N, k: K, a: { tensor: x, row: K, col: 1 },
        b: { tensor: weight, row: 1, col: K, batch: N * K },
        c: { tensor: y, row: N }, tiles: groupedTiles(offsets, S, tileRows(kernel)), kernel,
      });
    }
    return y;
  },
  backward({ x, weight, offsets, options }: Saved, [dy], needs) {
    if (!dy) return [];
    const [S, K] = x.shape as [number, number];
    const [E, N] = weight.shape as [number, number, number];
    const kernel = productKernel(x.device, options.kernel);
    const dx = needs[0] ? x.device.empty(x.shape) : null;
    if (dx) {
      product({
        m: S, n: K, k: N, a: { tensor: dy, row: N, col: 1 },
        b: { tensor: weight, row: K, col: 1, batch: N * K },
        c: { tensor: dx, row: K }, tiles: groupedTiles(offsets, S, tileRows(kernel)), kernel,
      });
    }
    const dweight = needs[1] ? x.device.empty(weight.shape) : null;
    if (dweight) {
      product({
        m: N, n: K, k: S, batches: E, a: { tensor: dy, row: 1, col: N }, b: { tensor: x, row: K, col: 1 },
        c: { tensor: dweight, row: K, batch: N * K }, offsets, kernel,
      });
    }
    return [dx, dweight];
  },
}), (x, { codes, scales, format }, offsets) => grouped_linear_blocks(x, codes, scales, offsets, { format }));
