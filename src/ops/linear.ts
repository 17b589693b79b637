import { check } from "../tensor/check.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { nextKey, type Tensor } from "../tensor/tensor.ts";
import { linear_blocks, orBlocks } from "./block_linear.ts";
import { converted, type FloatDType, product, productDType } from "./gemm.ts";
import { vectorKernel, vectorProduct } from "./matvec.ts";
import { defineOp, type Op } from "./op.ts";
import { relu2Gradients } from "./relu2_gradient.ts";
import type { Rounding } from "./rounding.ts";
import { sumRows } from "./sum_rows.ts";

export interface LinearOptions {
  /** relu2: max(., 0)^2 of the product with its bias. */
  readonly activation?: "relu2";
  /** Number format of the result; default: that of x and weight where both are the same half, or f32. */
  readonly out?: FloatDType;
  /** Rounds the factors of the product and of its gradients; default: they stay as they are. */
  readonly rounding?: Rounding;
}

interface Saved {
  /** x as the weight's gradient reads it; null where there is none. */
  readonly kept: Tensor | null;
  /** x itself, if it is max(g, 0)^2: then the gradient of g is due. */
  readonly x: Tensor | null;
  readonly shape: readonly number[];
  readonly weight: Tensor;
  readonly rounding: Rounding | undefined;
  /** max(h, 0)^2, from which the backward pass takes max(h, 0); null without an activation. */
  readonly squared: Tensor | null;
}

const dense: Op<
  [x: Tensor, weight: Tensor, bias: Tensor | null, residual?: Tensor | null, options?: LinearOptions], Tensor
> = defineOp({
  name: "linear",
  halves: [0, 1, 2, 3],
  relu2: [0],
  weights: [1, 2],
  forward(
    ctx, x: Tensor, weight: Tensor, bias: Tensor | null, residual: Tensor | null = null,
    options: LinearOptions = {},
  ): Tensor {
    check(x.shape.length >= 1, "linear", "x", "[..., K]", x);
    const K = x.shape.at(-1)!;
    check(weight.shape.length === 2 && weight.shape[1] === K, "linear", "weight", `[N, ${K}]`, weight);
    const N = weight.shape[0]!;
    if (bias) check(bias.shape.length === 1 && bias.shape[0] === N, "linear", "bias", `[${N}]`, bias);
    const shape = [...x.shape.slice(0, -1), N];
    const relu2 = options.activation === "relu2";
    if (residual) {
      check(residual.shape.join() === shape.join(), "linear", "residual", `[${shape.join(", ")}]`, residual);
      check(!relu2, "linear", "residual", "null beside an activation", residual);
    }
    const rows = sizeOf(x.shape.slice(0, -1));
    const y = x.device.empty(shape, productDType(x, weight, options.out));
    if (relu2) y.relu2Key = nextKey();
    const { rounding } = options;
    const rounded = rounding?.input(x, ctx.needs(1), null);
    const [a, b] = rounded ? [rounded.forward, rounding!.forward()] : [x, weight];
    ctx.save({
      kept: rounded ? rounded.kept && rounded.kept.tensor : x, x: x.relu2Key === null ? null : x,
      shape: x.shape, weight, rounding, squared: relu2 ? y : null,
    });
    const epilogue = {
      bias: bias && converted(bias, "f32"), relu2, residual: residual && converted(residual, "f32"),
    };
    const few = vectorKernel(a, b, rows);
    if (few) vectorProduct(few, a, b, y, epilogue);
    else {
      product({
        m: rows, n: N, k: K, a: { tensor: a, row: K, col: 1 }, b: { tensor: b, row: 1, col: K },
        c: { tensor: y, row: N }, ...epilogue,
      });
    }
    return y;
  },
  backward({ kept, x, shape, weight, rounding, squared }: Saved, [dy, dsquare], needs, into) {
    const dh = squared ? relu2Gradients(dy, dsquare, squared) : dy;
    if (!dh) return [];
    const [N, K] = weight.shape as [number, number];
    const { device } = dh;
    const rounded = rounding?.gradient(dh, { x: needs[0]!, weight: needs[1]! }, null);
    const dx = needs[0] ? into.empty(0, { device, shape }) : null;
    if (dx) {
      const [a, b] = rounded ? [rounded.backward!, rounding!.backward()] : [dh, weight];
      product({
        m: sizeOf(shape.slice(0, -1)), n: K, k: N, a: { tensor: a, row: N, col: 1 },
        b: { tensor: b, row: K, col: 1 }, c: { tensor: dx, row: K }, relu2_of: x && converted(x, "f32"),
        residual: x ? null : into.soFar(0),
      });
    }
    const dweight = needs[1] ? into.empty(1, weight) : null;
    if (dweight) {
      const a = rounded ? rounded.kept!.tensor : dh; // rounding may have filled up the rows of both
      product({
        m: N, n: K, k: a.size / Math.max(N, 1), a: { tensor: a, row: 1, col: N },
        b: { tensor: kept!, row: K, col: 1 }, c: { tensor: dweight, row: K },
      });
    }
    const dbias = needs[2] ? into.empty(2, { device, shape: [N] }) : null;
    if (dbias) sumRows(dh, dh.size / Math.max(N, 1), N, dbias);
    return [dx, dweight, dbias, needs[3] ? dh : null];
  },
});

/**
 * y = activation(x W^T + bias) + residual, in one launch. x, weight, bias and residual may be f32, f16 or
 * bf16; sums are f32, and so are the gradients. What belongs to an activation with a residual is not kept:
 * use two ops there.
 *
 * @param x         [..., K]
 * @param weight    [N, K], or block-quantised (`quantize`): then without a gradient
 * @param bias      [N], or null
 * @param residual  [..., N], added last; or null
 * @returns [..., N]
 * @throws ShapeError when the widths differ, or for an activation together with a residual
 */
export const linear = orBlocks(dense, (
  x, { codes, scales, format, global }, bias, residual = null, options = {},
) =>
  linear_blocks(x, codes, scales, bias, residual, { format, global, activation: options.activation }));
