import { launch } from "../kernel/launch.ts";
import {
  BLOCK_LAYOUTS, type BlockFormat, blockScaleShape, BlockTensor, codeWords,
} from "../tensor/blocks.ts";
import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import type { ScaleRule } from "../tensor/formats.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { scope } from "../tensor/scope.ts";
import { isHalf, type Tensor } from "../tensor/tensor.ts";
import { cast } from "./cast.ts";
import { defineOp, noGrad } from "./op.ts";

const WG = 32;
/** Values that one workgroup looks through for the largest. */
const LARGEST_SPAN = 8192;

/** Conditions of the kernels that read or write a format. */
const CONDITIONS = {
  q8: [], q4: ["q4"], mxfp8_e4m3: ["e4m3", "e8m0"], mxfp8_e5m2: ["e5m2", "e8m0"], mxfp4: ["e2m1", "e8m0"],
  nvfp4: ["e2m1", "outer"], fp8_e4m3: ["e4m3", "outer"], fp8_e5m2: ["e5m2", "outer"], fp8_blockwise: ["e4m3"],
} as const;
type BlockCondition = (typeof CONDITIONS)[BlockFormat][number];

export function blockConditions(format: BlockFormat): readonly BlockCondition[] {
  return CONDITIONS[format];
}

export interface QuantizeOptions {
  /** MX formats: see `ScaledOptions` of src/tensor/formats.ts. Default floor. */
  readonly scaleRule?: ScaleRule;
  /** fp8_e4m3, fp8_e5m2: one scale per row instead of one per matrix. */
  readonly perRow?: boolean;
  /** nvfp4: a scale for every tile of 16 x 16, as nvfp4_16x16; each of its rows holds it. */
  readonly tiles?: boolean;
  /** nvfp4: see `ScaledOptions`; one at a time, and fourOverSix not with tiles. */
  readonly reciprocals?: boolean;
  readonly fourOverSix?: "absolute" | "squared";
}

/**
 * Codes and scales of a matrix or a stack of them: every value becomes the nearest code of its block, ties to
 * even. The same bits on every adapter, and for all formats but q8 and q4 those of `quantizeScaled` for each
 * matrix of a stack; fp8_blockwise takes blocks of 1 x 128. Scales of q8 and q4 are as large as half
 * precision allows at most.
 *
 * @param values  f32 [..., K], finite; K a multiple of the format's block
 * @returns codes u32 [..., K * bits / 32], scales (see `BlockTensor`), and for nvfp4 the global scales
 * @throws ShapeError when K, or with `tiles` the number of rows, is not a multiple of the block, UsageError
 *   for an option of another format and for options that do not go together
 */
export const quantize_blocks = defineOp({
  name: "quantize_blocks",
  forward(_ctx, values: Tensor, format: BlockFormat, options: QuantizeOptions = {}): Tensor[] {
    const { block, scale } = BLOCK_LAYOUTS[format];
    const K = values.shape.at(-1) ?? 0;
    check(
      values.shape.length > 0 && K % block === 0, "quantize", "values",
      `[..., K] with K a multiple of ${block}, the block of ${format}`, values);
    if (options.perRow && scale !== "rows") {
      throw new UsageError(`quantize: perRow is for fp8_e4m3 and fp8_e5m2, found ${format}.`);
    }
    if (options.scaleRule && !format.startsWith("mx")) {
      throw new UsageError(`quantize: scaleRule is for the MX formats, found ${format}.`);
    }
    checkNvfp4(values, format, options);
    const codes = values.device.empty([...values.shape.slice(0, -1), codeWords(K, format)], "u32");
    if (format !== "q8" && format !== "q4") return quantizeScaledBlocks(values, format, codes, options);
    const scales = values.device.empty(blockScaleShape(values.shape, format), "f16");
    launch("quant/quantize", {
      bind: { values, codes, scales }, params: { count: scales.size },
      conditions: format === "q4" ? ["q4"] : [], workgroups: [Math.ceil(scales.size / 2 / WG)],
    });
    return [codes, scales];
  },
});

function checkNvfp4(values: Tensor, format: BlockFormat, options: QuantizeOptions): void {
  const asked = (["tiles", "reciprocals", "fourOverSix"] as const).filter((name) => options[name]);
  if (asked.length > 0 && format !== "nvfp4") {
    throw new UsageError(`quantize: ${asked[0]} is for nvfp4, found ${format}.`);
  }
  if (options.fourOverSix && asked.length > 1) {
    throw new UsageError(`quantize: fourOverSix does not go together with ${asked[0]}.`);
  }
  if (!options.tiles) return;
  check(values.shape.length > 1 && values.shape.at(-2)! % 16 === 0, "quantize", "values",
    "[..., N, K] with N a multiple of 16 for tiles", values);
}

function quantizeScaledBlocks(
  values: Tensor, format: Exclude<BlockFormat, "q8" | "q4">, codes: Tensor, options: QuantizeOptions,
): Tensor[] {
  const { device, shape } = values;
  const { block, scale } = BLOCK_LAYOUTS[format];
  const { tiles = false, reciprocals = false, fourOverSix } = options;
  const conditions = [
    ...blockConditions(format).filter((each) => each !== "e4m3" && each !== "q4"),
    ...(tiles ? ["square" as const] : []), ...(reciprocals ? ["reciprocals" as const] : []),
    ...(fourOverSix ? ["four_over_six" as const] : []),
    ...(fourOverSix === "squared" ? ["squared" as const] : []),
  ];
  const rows = sizeOf(shape.slice(0, -1));
  const groups = options.perRow ? rows : shape.length === 3 ? shape[0]! : 1;
  const span = values.size / Math.max(groups, 1);
  const params = {
    count: groups, span, pieces: 1, up: options.scaleRule === "ceil" ? 1 : 0,
    across: Math.max((shape.at(-1) ?? 0) / block, 1),
  };
  let [outer, amax]: [Tensor | null, Tensor | null] = [null, null];
  if (scale === "rows" || format === "nvfp4") {
    amax = device.zeros([groups], "u32");
    outer = device.empty([groups]);
    const pieces = Math.max(Math.ceil(span / LARGEST_SPAN), 1);
    launch("quant/quantize_scaled", {
      entry: "largest", bind: { values, magnitudes: amax }, params: { ...params, pieces }, constants: { WG },
      workgroups: [values.size === 0 ? 0 : groups * pieces],
    });
    launch("quant/quantize_scaled", {
      entry: "tensor_scales", bind: { largest_bits: amax, outer }, params, constants: { WG }, conditions,
      workgroups: [Math.ceil(groups / WG)],
    });
  }
  const stored = scale === "rows"
    ? device.empty([1], "u32")
    : device.empty(blockScaleShape(shape, format), scale === "f32" ? "f32" : "u32");
  const count = values.size / block;
  const squares = tiles ? device.empty([count / 16], "u32") : null;
  if (squares) {
    launch("quant/quantize_scaled", {
      entry: "tile_largest", bind: { values, tile_magnitudes: squares },
      params: { ...params, count: count / 16 }, constants: { WG }, conditions,
      workgroups: [Math.ceil(count / 16 / WG)],
    });
  }
  launch("quant/quantize_scaled", {
    entry: "quantize_scaled",
    bind: {
      values, outer_bits: outer ?? values, codes, scales: stored, largest_bits: amax ?? values,
      tile_bits: squares ?? values,
    },
    params: { ...params, count }, constants: { WG }, conditions,
    workgroups: [Math.ceil(count / (scale === "bytes" ? 4 : 1) / WG)],
  });
  if (scale === "rows") return [codes, outer!];
  return outer ? [codes, stored, outer] : [codes, stored];
}

/**
 * The values of codes and scales.
 *
 * @param codes   u32 [..., K * bits / 32]
 * @param scales  as in `BlockTensor`
 * @param global  f32 [1] or [E] for nvfp4, else null
 * @param divides  whether values are divided by `global`; default: they are multiplied with it
 * @returns f32 [..., K]
 * @throws ShapeError when codes and scales do not belong together
 */
export const dequantize_blocks = defineOp({
  name: "dequantize_blocks",
  halves: [1],
  forward(
    _ctx, codes: Tensor, scales: Tensor, format: BlockFormat, global: Tensor | null = null,
    divides: boolean = false,
  ): Tensor {
    const shape = valueShape("dequantize", codes, scales, format, global);
    const rows = sizeOf(shape.slice(0, -1));
    return decode(codes, scales, format, shape, rows, null, global, divides);
  },
});

/**
 * y[t] = row ids[t] of a quantised table; an id outside the table gives zeros.
 *
 * @param ids     i32 [...]
 * @param codes   u32 [V, K * bits / 32]
 * @param scales, global  as in `BlockTensor`
 * @param divides  whether values are divided by `global`
 * @returns f32 [..., K]
 */
export const embedding_blocks = defineOp({
  name: "embedding_blocks",
  halves: [2],
  forward(
    _ctx, ids: Tensor, codes: Tensor, scales: Tensor, format: BlockFormat, global: Tensor | null = null,
    divides: boolean = false,
  ): Tensor {
    const [V, K] = valueShape("embedding", codes, scales, format, global) as [number, number];
    check(codes.shape.length === 2, "embedding", "weight", "[V, D]", codes);
    return decode(codes, scales, format, [...ids.shape, K], V, ids, global, divides);
  },
});

/** The shape of the values of codes [..., K * bits / 32] with their scales. */
export function valueShape(
  op: string, codes: Tensor, scales: Tensor, format: BlockFormat, global: Tensor | null = null,
): number[] {
  const { bits, block, scale, global: wanted } = BLOCK_LAYOUTS[format];
  const K = ((codes.shape.at(-1) ?? 0) * 32) / bits;
  const shape = [...codes.shape.slice(0, -1), K];
  check(K % block === 0, op, "codes", `whole blocks of ${block} values of ${bits} bits`, codes);
  const matrices = shape.length === 3 ? shape[0]! : 1;
  if (scale === "rows") {
    const counts = [1, matrices, sizeOf(shape.slice(0, -1))];
    check(counts.includes(scales.size), op, "scales", `${[...new Set(counts)].join(" or ")} scales`, scales);
  } else {
    const expected = blockScaleShape(shape, format);
    check(scales.shape.join() === expected.join(), op, "scales", `[${expected.join(", ")}]`, scales);
  }
  if (wanted) {
    const fits = global?.size === 1 || global?.size === matrices;
    check(fits, op, "global", `[1] or [${matrices}]`, global ?? []);
  } else check(!global, op, "global", `null for ${format}`, global ?? []);
  return shape;
}

/** The tensor that sums are multiplied with at the end, and how many rows share one of its elements. */
export function outerScale(
  scales: Tensor, format: BlockFormat, global: Tensor | null, rows: number,
): { outer: Tensor; outer_rows: number } {
  const outer = global ?? scales;
  const counts = global !== null || BLOCK_LAYOUTS[format].scale === "rows";
  return { outer, outer_rows: counts ? Math.max(rows / Math.max(outer.size, 1), 1) : 1 };
}

function decode(
  codes: Tensor, scales: Tensor, format: BlockFormat, shape: readonly number[], limit: number,
  ids: Tensor | null, global: Tensor | null, divides: boolean,
): Tensor {
  const values = codes.device.empty(shape);
  const rows = sizeOf(shape.slice(0, -1));
  const units = shape.at(-1)! / (format === "q8" || format === "q4" ? 32 : 16);
  const { outer, outer_rows } = outerScale(scales, format, global, limit);
  launch("quant/dequantize", {
    bind: { codes, scales, values, ids: ids ?? codes, outer }, params: { rows, units, limit, outer_rows },
    conditions: [
      ...blockConditions(format), ...(ids ? ["gather" as const] : []),
      ...(divides ? ["divides" as const] : []),
    ],
    workgroups: [limit === 0 ? 0 : Math.ceil((rows * units) / WG)],
  });
  return values;
}

/**
 * A matrix, or a stack of them, in a block format. Not differentiable.
 *
 * @param values  f32 [..., K], finite; K a multiple of the format's block
 * @throws ShapeError when K is not a multiple of the block
 */
export function quantize(values: Tensor, format: BlockFormat, options: QuantizeOptions = {}): BlockTensor {
  return scope(() => {
    const [codes, scales, global] = noGrad(() => quantize_blocks(values, format, options)) as
      [Tensor, Tensor, Tensor | undefined];
    return new BlockTensor(
      values.shape, format, codes.retain(), scales.retain(), global?.retain() ?? null);
  });
}

/** The values of a block tensor: f32 of the same shape. */
export function dequantize(blocks: BlockTensor): Tensor {
  const { codes, scales, format, global, divisor } = blocks;
  return dequantize_blocks(codes, scales, format, divisor ?? global, divisor !== null);
}

/** The same weight as a dense f32 tensor, for ops that need one. */
export function denseWeight(weight: Tensor | BlockTensor): Tensor {
  if (weight instanceof BlockTensor) return dequantize(weight);
  return isHalf(weight.dtype) ? cast(weight, "f32") : weight;
}
