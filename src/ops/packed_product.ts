/** Products of which both factors are packed codes with scales. */
import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import { BLOCK_LAYOUTS, type BlockFormat, type BlockTensor } from "../tensor/blocks.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { DTypeError } from "../tensor/errors.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { evenOffsets, groupedTiles } from "./gemm.ts";
import { defineOp } from "./op.ts";
import { blockConditions, outerScale, quantize, valueShape } from "./quantize.ts";

/**
 * `packed_quad` is for software adapters. `packed_dots` and `packed_f16` take E2M1 on both sides and give the
 * bits of `packed_tile`: they are candidates of the tuner alone, never a default.
 */
export type PackedKernel = "packed_quad" | "packed_tile" | "packed_dots" | "packed_f16";

/** What x may be beside a weight of each format. */
const PARTNERS: Partial<Record<BlockFormat, readonly BlockFormat[]>> = {
  mxfp8_e4m3: ["mxfp8_e4m3", "mxfp8_e5m2"], mxfp8_e5m2: ["mxfp8_e4m3", "mxfp8_e5m2"],
  mxfp4: ["mxfp4"], nvfp4: ["nvfp4"],
  fp8_e4m3: ["fp8_e4m3", "fp8_e5m2"], fp8_e5m2: ["fp8_e4m3", "fp8_e5m2"], fp8_blockwise: ["fp8_blockwise"],
};

export interface PackedOptions {
  readonly xFormat: BlockFormat;
  readonly format: BlockFormat;
  /** Scales of matrices beside those of blocks, as in `BlockTensor`. */
  readonly xGlobal?: Tensor | null;
  readonly global?: Tensor | null;
  /** Which kernel computes it; default: the one that suits the adapter and the shape. */
  readonly kernel?: PackedKernel;
}

/**
 * y = x W^T, or y[s] = W[e] x[s] for the rows offsets[e] <= s < offsets[e + 1] of every expert e, with x and
 * W given by codes and scales. Sums of a block are multiplied with the scales of the block, their sum with
 * those of rows and matrices. Without a gradient.
 *
 * @param x_codes, x_scales  [M, K] as in `BlockTensor`
 * @param codes, scales      [N, K], or with offsets [E, N, K]
 * @param offsets  u32 [E + 1], ascending from 0 to M, or null
 * @returns f32 [M, N]
 * @throws DTypeError for formats that do not go together, ShapeError when the widths or the number of experts
 *   differ
 */
export const packed_product = defineOp({
  name: "packed_product",
  halves: [1, 3], // of q8 and q4, which are refused by name
  forward(
    _ctx, x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | null,
    { xFormat, format, xGlobal = null, global = null, kernel }: PackedOptions,
  ): Tensor {
    const name = offsets ? "grouped_linear_packed" : "linear_packed";
    checkFormats(name, xFormat, format);
    const x = valueShape(name, x_codes, x_scales, xFormat, xGlobal);
    const weight = valueShape(name, codes, scales, format, global);
    check(x.length === 2, name, "x", "[M, K]", x);
    const [M, K] = x as [number, number];
    const lead = offsets ? 1 : 0;
    check(weight.length === 2 + lead && weight.at(-1) === K, name, "weight", `[${lead ? "E, " : ""}N, ${K}]`,
      weight);
    const N = weight[lead]!;
    const E = offsets ? weight[0]! : 1;
    if (offsets) {
      check(offsets.shape.length === 1 && offsets.size === E + 1, name, "offsets", `[${E + 1}]`, offsets);
    }
    const { device } = x_codes;
    const y = device.empty([M, N]);
    record({
      kernel: kernel ?? (offsets
        ? choose(device, groupedPackedTuning, { rows: M, experts: E, n: N, k: K, format })
        : choose(device, packedTuning, { m: M, n: N, k: K, format })),
      x: { codes: x_codes, scales: x_scales, format: xFormat, global: xGlobal },
      weight: { codes, scales, format, global }, offsets, y, k: K,
    });
    return y;
  },
});

interface Packed extends Pick<BlockTensor, "codes" | "scales" | "format" | "global"> {}

interface PackedProduct {
  readonly kernel: PackedKernel;
  readonly x: Packed;
  readonly weight: Packed;
  readonly y: Tensor;
  readonly k: number;
  readonly offsets?: Tensor | null;
}

function record({ kernel, x, weight, y, k, offsets = null }: PackedProduct): void {
  const [m, n] = y.shape as [number, number];
  const { format } = weight;
  const quads = kernel === "packed_quad";
  const tile = quads ? 16 : 64;
  const tiles = offsets ? groupedTiles(offsets, m, tile) : null;
  const row_tiles = tiles ? tiles.shape[0]! : Math.ceil(m / tile);
  const count = row_tiles * Math.ceil(n / tile);
  const { block, scale } = BLOCK_LAYOUTS[format];
  const ofRows = outerScale(x.scales, x.format, x.global, m);
  const columns = offsets ? n * weight.codes.shape[0]! : n;
  const ofColumns = outerScale(weight.scales, format, weight.global, columns);
  launch("quant/packed_product", {
    entry: quads ? "packed_quad" : "packed_tile",
    bind: {
      x_codes: x.codes, x_scales: x.scales, codes: weight.codes, scales: weight.scales, y,
      tiles: tiles ?? weight.codes, x_outer: ofRows.outer, outer: ofColumns.outer,
    },
    params: {
      m, n, k, row_tiles, block: scale === "rows" ? Math.max(k / 16, 1) : block / 16, group: 4,
      x_outer_rows: ofRows.outer_rows, outer_rows: ofColumns.outer_rows,
    },
    conditions: [
      ...blockConditions(format).filter((each) => each !== "q4"),
      ...(x.format === format ? [] : [x.format.endsWith("e5m2") ? "x_e5m2" as const : "x_e4m3" as const]),
      ...(offsets ? ["grouped" as const] : []), ...(quads ? ["subgroups" as const] : []),
      ...(kernel === "packed_dots" ? ["dots" as const] : []),
      ...(kernel === "packed_f16" ? ["f16" as const] : []),
    ],
    workgroups: [quads ? Math.ceil(count / 8) : count],
  });
}

function checkFormats(op: string, x: BlockFormat, weight: BlockFormat): void {
  const partners = PARTNERS[weight];
  if (!partners) {
    const known = Object.keys(PARTNERS).join(", ");
    throw new DTypeError(`${op}: weight must be one of ${known}, found ${weight}.`);
  }
  if (!partners.includes(x)) {
    const wanted = partners.join(" or ");
    throw new DTypeError(`${op}: x must be ${wanted} beside a weight of ${weight}, found ${x}.`);
  }
}

type PackedShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly format: string;
};

const packedTuning = defineTunable({
  name: "quant/packed_product",
  classOf: (shape: PackedShape) => ({
    ...shape, m: bucket(shape.m), n: bucket(shape.n), k: wholeBlocks(shape),
  }),
  candidates: (device: Device, { format }) => packedKernels(device, format),
  fallback: (device) => kernelFor(device),
  trial: (device, { m, n, k, format }) => trial(() => {
    const packed = (rows: number, stream: number) =>
      scope(() => quantize(randomTensor(device, [rows, k], stream, k ** -0.25), format as BlockFormat));
    return { x: packed(m, 0), weight: packed(n, 1) };
  }, ({ x, weight }, kernel: PackedKernel) => {
    const y = device.empty([m, n]);
    record({ kernel, x, weight, y, k });
    return y;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

type GroupedPackedShape = {
  readonly rows: number; readonly experts: number; readonly n: number; readonly k: number;
  readonly format: string;
};

/** The kernel of a product of experts. */
const groupedPackedTuning = defineTunable({
  name: "quant/grouped_packed",
  classOf: (shape: GroupedPackedShape) => ({
    ...shape, rows: bucket(shape.rows), experts: bucket(shape.experts, 256), n: bucket(shape.n),
    k: wholeBlocks(shape),
  }),
  candidates: (device: Device, { format }) => packedKernels(device, format),
  fallback: (device) => kernelFor(device),
  trial: (device, { rows, experts, n, k, format }) => trial(() => {
    const packed = (shape: number[], stream: number) =>
      scope(() => quantize(randomTensor(device, shape, stream, k ** -0.25), format as BlockFormat));
    return {
      x: packed([rows, k], 0), weight: packed([experts, n, k], 1),
      offsets: evenOffsets(device, rows, experts),
    };
  }, ({ x, weight, offsets }, kernel: PackedKernel) => {
    const y = device.empty([rows, n]);
    record({ kernel, x, weight, y, k, offsets });
    return y;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

function wholeBlocks({ k, format }: { readonly k: number; readonly format: string }): number {
  return Math.max(format === "fp8_blockwise" ? 128 : 32, bucket(k));
}

function packedKernels(device: Device, format: string): PackedKernel[] {
  const isFour = BLOCK_LAYOUTS[format as BlockFormat].bits === 4;
  const dots = isFour && device.info.languageFeatures.includes("packed_4x8_integer_dot_product");
  const halves = isFour && device.gpuDevice.features.has("shader-f16");
  return [
    ...(device.hasSubgroups ? ["packed_quad" as const] : []), "packed_tile",
    ...(dots ? ["packed_dots" as const] : []), ...(halves ? ["packed_f16" as const] : []),
  ];
}

function kernelFor(device: Device): PackedKernel {
  return device.info.isSoftware && device.hasSubgroups ? "packed_quad" : "packed_tile";
}

/**
 * y = x W^T of two matrices in block formats: the same, or the two of eight bits with the same scales.
 * Without a gradient.
 *
 * @param x       [M, K]
 * @param weight  [N, K]
 * @returns f32 [M, N]
 * @throws DTypeError for formats that do not go together, ShapeError when the widths differ
 */
export function linear_packed(x: BlockTensor, weight: BlockTensor): Tensor {
  return packed_product(x.codes, x.scales, weight.codes, weight.scales, null, options(x, weight));
}

/**
 * y[s] = weight[e] x[s] for the rows offsets[e] <= s < offsets[e + 1] of every expert e; formats as in
 * `linear_packed`. Without a gradient.
 *
 * @param x        [S, K], rows sorted by expert
 * @param weight   [E, N, K]
 * @param offsets  u32 [E + 1], ascending from 0 to S
 * @returns f32 [S, N]
 */
export function grouped_linear_packed(x: BlockTensor, weight: BlockTensor, offsets: Tensor): Tensor {
  return packed_product(x.codes, x.scales, weight.codes, weight.scales, offsets, options(x, weight));
}

function options(x: BlockTensor, weight: BlockTensor): PackedOptions {
  return { xFormat: x.format, format: weight.format, xGlobal: x.global, global: weight.global };
}
