import { check } from "../tensor/check.ts";
import { nextKey, type Tensor } from "../tensor/tensor.ts";
import { grouped_linear_blocks, orBlocks } from "./block_linear.ts";
import { relu2 } from "./elementwise.ts";
import { converted, type FloatDType, productDType } from "./gemm.ts";
import { type GroupedKernel, groupedProduct } from "./grouped_product.ts";
export { expert_tiles } from "./grouped_product.ts";
import { combine, moe_permute } from "./moe.ts";
import { defineOp, type Op } from "./op.ts";
import { relu2Gradients } from "./relu2_gradient.ts";
import type { Rounding, Summand } from "./rounding.ts";

export interface GroupedLinearOptions {
  /** Which kernel computes it; default: the one that suits the adapter and the shape. */
  readonly kernel?: GroupedKernel;
  /** Number format of the result; default: that of x and weight where both are the same half, or f32. */
  readonly out?: FloatDType;
  /** relu2: max(., 0)^2 of the product. */
  readonly activation?: "relu2";
  /**
   * Takes x in the order of tokens: row s of the product reads row floor(slot_token[s] / topk) of x. As if
   * moe_permute came before, without its copy. From moe_plan, with the number of experts per token.
   */
  readonly permute?: { readonly slot_token: Tensor; readonly token_slot: Tensor; readonly topk: number };
  /**
   * The offsets may end before the last row (of `permute`: the last slot, and choices may have none): the
   * rows from there on are zero, those of x are not read, and their gradient is zero.
   */
  readonly spare?: boolean;
  /** From `expert_tiles` for the same offsets; otherwise every product works them out. */
  readonly tiles?: Tensor | null;
  /** Rounds the factors of the product and of its gradients; default: they stay as they are. */
  readonly rounding?: Rounding;
}

interface Saved {
  /** x as the weight's gradient reads it; null where there is none. */
  readonly kept: Summand | null;
  /** x itself, if it is max(g, 0)^2: then the gradient of g is due. */
  readonly x: Tensor | null;
  readonly shape: readonly number[];
  readonly weight: Tensor;
  readonly offsets: Tensor;
  readonly options: GroupedLinearOptions;
  /** max(h, 0)^2, from which the backward pass takes max(h, 0); null without an activation. */
  readonly squared: Tensor | null;
}

const name = "grouped_linear";

const dense: Op<
  [x: Tensor, weight: Tensor, offsets: Tensor, options?: GroupedLinearOptions], Tensor
> = defineOp({
  name,
  halves: [0, 1],
  relu2: [0],
  weights: [1],
  forward(ctx, x: Tensor, weight: Tensor, offsets: Tensor, options: GroupedLinearOptions = {}): Tensor {
    check(x.shape.length === 2, name, "x", "[S, K]", x);
    const { permute, activation, spare = false } = options;
    const K = x.shape[1]!;
    const choices = x.shape[0]! * (permute?.topk ?? 1);
    const S = permute && spare ? permute.slot_token.size : choices;
    if (permute) {
      const table = spare ? permute.token_slot : permute.slot_token;
      check(table.size === choices, name, "permute", `made for ${choices} choices`, table);
    }
    check(weight.shape.length === 3 && weight.shape[2] === K, name, "weight", `[E, N, ${K}]`, weight);
    const [E, N] = weight.shape as [number, number, number];
    check(offsets.shape.length === 1 && offsets.size === E + 1, name, "offsets", `[${E + 1}]`, offsets);
    const dtype = productDType(x, weight, options.out);
    const y = spare ? x.device.zeros([S, N], dtype) : x.device.empty([S, N], dtype);
    if (activation) y.relu2Key = nextKey();
    const { rounding } = options;
    const rounded = rounding?.input(x, ctx.needs(1), { offsets, permute });
    const [left, right] = rounded ? [rounded.forward, rounding!.forward()] : [x, weight];
    ctx.save({
      kept: rounded ? rounded.kept : { tensor: x, offsets: null }, x: x.relu2Key === null ? null : x,
      shape: x.shape, weight, offsets, options, squared: activation ? y : null,
    });
    groupedProduct({
      pass: "forward", left, right, out: y, offsets, permute, kernel: options.kernel,
      tiles: options.tiles, relu2: activation === "relu2", spare,
    });
    return y;
  },
  backward(
    { kept, x, shape, weight, offsets, options, squared }: Saved, [dy, dsquare], needs, into,
  ) {
    const dh = squared ? relu2Gradients(dy, dsquare, squared) : dy;
    if (!dh) return [];
    const { permute, rounding, kernel, spare = false } = options;
    const { device } = dh;
    const K = weight.shape[2]!;
    const S = dh.shape[0]!;
    const rounded = rounding?.gradient(dh, { x: needs[0]!, weight: needs[1]! }, { offsets });
    let dx = needs[0] ? into.empty(0, { device, shape }) : null;
    if (dx) {
      const [left, right] = rounded ? [rounded.backward!, rounding!.backward()] : [dh, weight];
      const rows = permute ? device.empty([S, K]) : dx;
      const before = x && converted(x, "f32");
      // Rows of nobody would not get what they have so far.
      const soFar = before || (spare && !permute) ? null : into.soFar(0);
      if (spare && !permute) dx.clear();
      groupedProduct({
        pass: "inputs", left, right, out: rows, offsets, kernel, tiles: options.tiles,
        ...(permute ? {} : { relu2_of: before, residual: soFar }),
      });
      if (permute) {
        combine(rows, { ...permute, offsets, spare }, null, soFar, dx, permute.topk);
        if (before) dx = relu2Gradients(dx, null, before);
      }
    }
    const dweight = needs[1] ? into.empty(1, weight) : null;
    if (dweight) {
      const left = rounded ? rounded.kept! : { tensor: dh, offsets: null };
      groupedProduct({
        pass: "weights", left: left.tensor, right: kept!.tensor, out: dweight,
        offsets: left.offsets ?? offsets, permute: left.offsets ? undefined : permute, kernel,
      });
    }
    return [dx, dweight];
  },
});

/**
 * y[s] = activation(weight[e] x[s]) for the rows offsets[e] <= s < offsets[e + 1] of every expert e.
 *
 * x and weight may be f32, f16 or bf16; sums are f32, and so are the gradients. The offsets are read on the
 * GPU only. The gradient of an expert without rows is exactly zero.
 *
 * @param x        [S, K], rows sorted by expert; with `permute` [S / topk, K] in the order of tokens
 * @param weight   [E, N, K], or block-quantised (`quantize`): then without a gradient
 * @param offsets  u32 [E + 1], ascending from 0 to S, with `spare` to S at most
 * @returns [S, N]
 * @throws ShapeError when the widths or the number of experts differ, or for a plan of another size
 */
export const grouped_linear = orBlocks(dense, (x, weight, offsets, options = {}) => {
  const { codes, scales, format, global } = weight;
  const { permute, activation, spare = false } = options;
  const rows = permute ? moe_permute(x, { offsets, ...permute, spare }, permute.topk) : x;
  const h = grouped_linear_blocks(rows, codes, scales, offsets, { format, global });
  return activation ? relu2(h) : h;
});
