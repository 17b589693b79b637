import { launch } from "../kernel/launch.ts";
import { BLOCK_LAYOUTS, type BlockFormat, BlockTensor, codeWords } from "../tensor/blocks.ts";
import { check } from "../tensor/check.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { scope } from "../tensor/scope.ts";
import { isHalf, type Tensor } from "../tensor/tensor.ts";
import { cast } from "./cast.ts";
import { defineOp, noGrad } from "./op.ts";

const WG = 32;

/**
 * Codes and scales of a matrix: every value becomes the nearest code of its block, ties to even. The same
 * bits on every adapter. Scales are as large as half precision allows at most.
 *
 * @param values  f32 [..., K], finite; K a multiple of the format's block
 * @returns codes u32 [..., K * bits / 32] and scales f16 [..., K / block]
 * @throws ShapeError when K is not a multiple of the block
 */
export const quantize_blocks = defineOp({
  name: "quantize_blocks",
  forward(_ctx, values: Tensor, format: BlockFormat): Tensor[] {
    const { block } = BLOCK_LAYOUTS[format];
    const K = values.shape.at(-1) ?? 0;
    check(
      values.shape.length > 0 && K % block === 0, "quantize", "values",
      `[..., K] with K a multiple of ${block}, the block of ${format}`, values);
    const lead = values.shape.slice(0, -1);
    const codes = values.device.empty([...lead, codeWords(K, format)], "u32");
    const scales = values.device.empty([...lead, K / block], "f16");
    launch("quant/quantize", {
      bind: { values, codes, scales }, params: { count: scales.size },
      conditions: format === "q4" ? ["q4"] : [], workgroups: [Math.ceil(scales.size / 2 / WG)],
    });
    return [codes, scales];
  },
});

/**
 * The values of codes and scales.
 *
 * @param codes   u32 [..., K * bits / 32]
 * @param scales  f16 [..., K / block]
 * @returns f32 [..., K]
 * @throws ShapeError when codes and scales do not belong together
 */
export const dequantize_blocks = defineOp({
  name: "dequantize_blocks",
  halves: [1],
  forward(_ctx, codes: Tensor, scales: Tensor, format: BlockFormat): Tensor {
    const shape = valueShape("dequantize", codes, scales, format);
    const rows = sizeOf(shape.slice(0, -1));
    return decode(codes, scales, format, shape, rows, null);
  },
});

/**
 * y[t] = row ids[t] of a quantised table; an id outside the table gives zeros.
 *
 * @param ids     i32 [...]
 * @param codes   u32 [V, K * bits / 32]
 * @param scales  f16 [V, K / block]
 * @returns f32 [..., K]
 */
export const embedding_blocks = defineOp({
  name: "embedding_blocks",
  halves: [2],
  forward(_ctx, ids: Tensor, codes: Tensor, scales: Tensor, format: BlockFormat): Tensor {
    const [V, K] = valueShape("embedding", codes, scales, format) as [number, number];
    check(codes.shape.length === 2, "embedding", "weight", "[V, D]", codes);
    return decode(codes, scales, format, [...ids.shape, K], V, ids);
  },
});

/** The shape of the values of codes [..., K * bits / 32] with scales [..., K / block]. */
export function valueShape(op: string, codes: Tensor, scales: Tensor, format: BlockFormat): number[] {
  const { bits, block } = BLOCK_LAYOUTS[format];
  const K = ((codes.shape.at(-1) ?? 0) * 32) / bits;
  const lead = codes.shape.slice(0, -1);
  check(K % block === 0, op, "codes", `whole blocks of ${block} values of ${bits} bits`, codes);
  check(
    scales.shape.join() === [...lead, K / block].join(), op, "scales", `[${[...lead, K / block].join(", ")}]`,
    scales);
  return [...lead, K];
}

function decode(
  codes: Tensor, scales: Tensor, format: BlockFormat, shape: readonly number[], limit: number,
  ids: Tensor | null,
): Tensor {
  const values = codes.device.empty(shape);
  const rows = sizeOf(shape.slice(0, -1));
  const blocks = shape.at(-1)! / BLOCK_LAYOUTS[format].block;
  launch("quant/dequantize", {
    bind: { codes, scales, values, ...(ids ? { ids } : { ids: codes }) }, params: { rows, blocks, limit },
    conditions: [...(format === "q4" ? ["q4" as const] : []), ...(ids ? ["gather" as const] : [])],
    workgroups: [limit === 0 ? 0 : Math.ceil((rows * blocks) / WG)],
  });
  return values;
}

/**
 * A matrix, or a stack of them, in a block format. Not differentiable.
 *
 * @param values  f32 [..., K], finite; K a multiple of the format's block
 * @throws ShapeError when K is not a multiple of the block
 */
export function quantize(values: Tensor, format: BlockFormat): BlockTensor {
  return scope(() => {
    const [codes, scales] = noGrad(() => quantize_blocks(values, format)) as [Tensor, Tensor];
    return new BlockTensor(values.shape, format, codes.retain(), scales.retain());
  });
}

/** The values of a block tensor: f32 of the same shape. */
export function dequantize(blocks: BlockTensor): Tensor {
  return dequantize_blocks(blocks.codes, blocks.scales, blocks.format);
}

/** The same weight as a dense f32 tensor, for ops that need one. */
export function denseWeight(weight: Tensor | BlockTensor): Tensor {
  if (weight instanceof BlockTensor) return dequantize(weight);
  return isHalf(weight.dtype) ? cast(weight, "f32") : weight;
}
