import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import { type BlockFormat, BlockTensor } from "../tensor/blocks.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { evenOffsets, groupedTiles, product } from "./gemm.ts";
import { defineOp, type Op } from "./op.ts";
import { productKernel, tileRows } from "./product_kernels.ts";
import { blockConditions, dequantize_blocks, outerScale, quantize, valueShape } from "./quantize.ts";
import { relu2Gradients } from "./relu2_gradient.ts";
import { sumRows } from "./sum_rows.ts";

/** Kernels of products with block-quantised weights; those with `quad` are for software adapters. */
export type BlockKernel = "block_matvec_quad" | "block_matvec" | "block_quad" | "block_tile";

export interface BlockOptions {
  readonly format: BlockFormat;
  /** Scales of matrices beside those of blocks, as in `BlockTensor`. */
  readonly global?: Tensor | null;
  /** relu2: max(., 0)^2 of the product with its bias; of linear only. */
  readonly activation?: "relu2" | undefined;
  /** Which kernel computes it; default: the one that suits the adapter and the shape. */
  readonly kernel?: BlockKernel;
}

interface Saved {
  readonly codes: Tensor;
  readonly scales: Tensor;
  readonly shape: readonly number[];
  readonly format: BlockFormat;
  readonly global: Tensor | null;
  readonly offsets: Tensor | null;
  /** What relu2 gave, where there was one. */
  readonly squared: Tensor | null;
}

/** Up to so many rows a product reads the weights once per row: decoding. */
const FEW_ROWS = { software: 2, hardware: 4, grouped: 8 } as const;
/** So many are measured so. */
const FEW_TRIED = { one: 16, grouped: 64 } as const;
/** From so many outputs on an invocation of block_matvec_quad takes eight rows of q4 weights. */
const ROWS8_FROM = 512;

/**
 * y = activation(x W^T + bias) + residual with W given by codes and scales. The gradient flows to x, bias and
 * residual.
 *
 * @param x       f32 [..., K]
 * @param codes   u32 [N, K * bits / 32]
 * @param scales  as in `BlockTensor`
 * @param bias    f32 [N], or null
 * @param residual  f32 [..., N], added last; or null
 * @returns f32 [..., N]
 * @throws ShapeError when the widths differ, or for an activation together with a residual
 */
export const linear_blocks = defineOp({
  name: "linear_blocks",
  halves: [2],
  forward(
    ctx, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | null, residual: Tensor | null,
    { format, kernel, activation, global = null }: BlockOptions,
  ): Tensor {
    const weight = valueShape("linear", codes, scales, format, global);
    const K = x.shape.at(-1) ?? 0;
    check(weight.length === 2 && weight[1] === K && x.shape.length > 0, "linear", "weight", `[N, ${K}]`,
      weight);
    const N = weight[0]!;
    if (bias) check(bias.shape.length === 1 && bias.shape[0] === N, "linear", "bias", `[${N}]`, bias);
    const shape = [...x.shape.slice(0, -1), N];
    if (residual) {
      check(residual.shape.join() === shape.join(), "linear", "residual", `[${shape.join(", ")}]`, residual);
      check(!activation, "linear", "residual", "null beside an activation", residual);
    }
    const y = x.device.empty(shape);
    ctx.save({
      codes, scales, shape: x.shape, format, global, offsets: null, squared: activation ? y : null,
    });
    record({
      kernel: kernel ?? choose(x.device, blockTuning,
        { m: sizeOf(x.shape.slice(0, -1)), n: N, k: K, format }), x, codes, scales, y, format, global, bias,
      residual, relu2: activation === "relu2",
    });
    return y;
  },
  backward({ codes, scales, shape, format, global, squared }: Saved, [dy], needs) {
    if (!dy) return [];
    const dx = needs[0] ? dy.device.empty(shape) : null;
    const dh = squared && (needs[0] || needs[3]) ? relu2Gradients(dy, null, squared)! : dy;
    const [N, K] = [dy.shape.at(-1)!, shape.at(-1)!];
    const m = sizeOf(shape.slice(0, -1));
    if (dx) {
      const weight = dequantize_blocks(codes, scales, format, global);
      product({
        m, n: K, k: N, a: { tensor: dh, row: N, col: 1 }, b: { tensor: weight, row: K, col: 1 },
        c: { tensor: dx, row: K },
      });
    }
    const dbias = needs[3] ? dy.device.empty([N]) : null;
    if (dbias) sumRows(dh, m, N, dbias);
    return [dx, null, null, dbias, needs[4] ? dy : null];
  },
});

/**
 * y[s] = W[e] x[s] for the rows offsets[e] <= s < offsets[e + 1] of every expert e, with W given by codes
 * and scales. The gradient flows to x.
 *
 * @param x        f32 [S, K], rows sorted by expert
 * @param codes    u32 [E, N, K * bits / 32]
 * @param scales   as in `BlockTensor`
 * @param offsets  u32 [E + 1], ascending from 0 to S
 * @returns f32 [S, N]
 * @throws ShapeError when the widths or the number of experts differ
 */
export const grouped_linear_blocks = defineOp({
  name: "grouped_linear_blocks",
  halves: [2],
  forward(
    ctx, x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor,
    { format, kernel, global = null }: BlockOptions,
  ): Tensor {
    const weight = valueShape("grouped_linear", codes, scales, format, global);
    check(x.shape.length === 2, "grouped_linear", "x", "[S, K]", x);
    const [S, K] = x.shape as [number, number];
    check(weight.length === 3 && weight[2] === K, "grouped_linear", "weight", `[E, N, ${K}]`, weight);
    const [E, N] = weight as [number, number, number];
    check(
      offsets.shape.length === 1 && offsets.size === E + 1, "grouped_linear", "offsets", `[${E + 1}]`,
        offsets);
    const y = x.device.empty([S, N]);
    ctx.save({ codes, scales, shape: x.shape, format, global, offsets, squared: null });
    record({
      kernel: kernel ?? choose(x.device, groupedBlockTuning, { rows: S, experts: E, n: N, k: K, format }), x,
      codes, scales, y, format, global, offsets,
    });
    return y;
  },
  backward({ codes, scales, shape, format, global, offsets }: Saved, [dy], needs) {
    if (!dy || !needs[0]) return [];
    const dx = dy.device.empty(shape);
    const [S, K] = shape as [number, number];
    const N = dy.shape[1]!;
    const kernel = productKernel(dy.device);
    product({
      m: S, n: K, k: N, a: { tensor: dy, row: N, col: 1 },
      b: { tensor: dequantize_blocks(codes, scales, format, global), row: K, col: 1, batch: N * K },
      c: { tensor: dx, row: K }, tiles: groupedTiles(offsets!, S, tileRows(kernel)), kernel,
    });
    return [dx];
  },
});

type BlockShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly format: string;
};

/** The kernel of a product without groups. */
const blockTuning = defineTunable({
  name: "quant/product",
  classOf: (shape: BlockShape) => ({
    ...shape, m: bucket(shape.m), n: bucket(shape.n), k: wholeBlocks(shape),
  }),
  candidates: (device: Device, { m }) => blockKernels(device, m <= FEW_TRIED.one),
  fallback: (device, { m }) => kernelFor(device, m),
  trial: (device, { m, n, k, format }) => trial(() => {
    const weight = scope(() => quantize(randomTensor(device, [n, k], 1, k ** -0.5), format as BlockFormat));
    return { x: randomTensor(device, [m, k]), weight };
  }, ({ x, weight: { codes, scales, global } }, kernel: BlockKernel) => {
    const y = device.empty([m, n]);
    record({ kernel, x, codes, scales, global, y, format: format as BlockFormat });
    return y;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

type GroupedBlockShape = {
  readonly rows: number; readonly experts: number; readonly n: number; readonly k: number;
  readonly format: string;
};

/** The kernel of a product of experts. */
const groupedBlockTuning = defineTunable({
  name: "quant/grouped",
  classOf: (shape: GroupedBlockShape) => ({
    ...shape, rows: bucket(shape.rows), experts: bucket(shape.experts, 256), n: bucket(shape.n),
    k: wholeBlocks(shape),
  }),
  candidates: (device: Device, { rows }) => blockKernels(device, rows <= FEW_TRIED.grouped),
  fallback: (device, { rows }) => kernelFor(device, rows, true),
  trial: (device, { rows, experts, n, k, format }) => trial(() => ({
    x: randomTensor(device, [rows, k]), offsets: evenOffsets(device, rows, experts),
    weight: scope(() =>
      quantize(randomTensor(device, [experts, n, k], 1, k ** -0.5), format as BlockFormat)),
  }), ({ x, offsets, weight: { codes, scales, global } }, kernel: BlockKernel) => {
    const y = device.empty([rows, n]);
    record({ kernel, x, codes, scales, global, y, format: format as BlockFormat, offsets });
    return y;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

function wholeBlocks({ k, format }: { readonly k: number; readonly format: string }): number {
  return Math.max(format === "fp8_blockwise" ? 128 : 32, bucket(k));
}

/** What the device can run; of `few` rows those too that take them one by one. */
function blockKernels(device: Device, few: boolean): BlockKernel[] {
  return [
    ...(device.hasSubgroups ? ["block_quad" as const] : []), "block_tile" as const,
    ...(few ? ["block_matvec" as const] : []),
    ...(few && device.hasSubgroups ? ["block_matvec_quad" as const] : []),
  ];
}

/** The kernel that suits the adapter. */
function kernelFor(device: Device, rows: number, grouped = false): BlockKernel {
  const quads = device.info.isSoftware && device.hasSubgroups;
  const few = grouped ? FEW_ROWS.grouped : quads ? FEW_ROWS.software : FEW_ROWS.hardware;
  if (rows <= few) return quads ? "block_matvec_quad" : "block_matvec";
  return quads ? "block_quad" : "block_tile";
}

interface BlockProduct {
  readonly kernel: BlockKernel;
  readonly x: Tensor;
  readonly codes: Tensor;
  readonly scales: Tensor;
  readonly y: Tensor;
  readonly format: BlockFormat;
  readonly global: Tensor | null;
  readonly bias?: Tensor | null;
  readonly residual?: Tensor | null;
  readonly relu2?: boolean;
  /** Rows of every expert, as in grouped_linear. */
  readonly offsets?: Tensor | null;
}

function record(
  {
    kernel, x, codes, scales, y, format, global, bias = null, residual = null, relu2 = false, offsets = null,
  }: BlockProduct,
): void {
  const [n, k] = [y.shape.at(-1)!, x.shape.at(-1)!];
  const m = y.size / Math.max(n, 1);
  const shared = [
    ...blockConditions(format), ...(bias ? ["bias" as const] : []),
    ...(relu2 ? ["relu2" as const] : []), ...(residual ? ["residual" as const] : []),
    ...(offsets ? ["grouped" as const] : []),
  ];
  const experts = offsets ? codes.shape[0]! : 0;
  const { outer, outer_rows } = outerScale(scales, format, global, n * Math.max(experts, 1));
  const bind = { x, codes, scales, y, outer, bias: bias ?? scales, residual: residual ?? scales };
  if (kernel === "block_matvec_quad" || kernel === "block_matvec") {
    const quads = kernel === "block_matvec_quad";
    const rows8 = quads && format === "q4" && n >= ROWS8_FROM;
    const pieces = quads ? Math.ceil(n / (rows8 ? 8 : 4) / 4) * 4 : Math.ceil(n / 16);
    return launch("quant/block_matvec", {
      entry: kernel, bind: { ...bind, offsets: offsets ?? codes },
      params: { m, n, k, experts, outer_rows },
      conditions: [
        ...shared, ...(rows8 ? ["rows8" as const] : []),
        ...(quads ? ["subgroups" as const] : []),
      ],
      workgroups: [quads ? Math.ceil((m * pieces) / 16) : m * pieces],
    });
  }
  const quads = kernel === "block_quad";
  const tile = quads ? 16 : 64;
  const tiles = offsets ? groupedTiles(offsets, m, tile) : null;
  const row_tiles = tiles ? tiles.shape[0]! : Math.ceil(m / tile);
  const count = row_tiles * Math.ceil(n / tile);
  const params = { m, n, k, row_tiles, outer_rows };
  if (!quads) {
    return launch("quant/block_tile", {
      bind: { ...bind, tiles: tiles ?? codes }, params, conditions: shared, workgroups: [count],
    });
  }
  launch("quant/block_quad", {
    bind: { ...bind, tiles: tiles ?? codes }, params: { ...params, group: 4 },
    conditions: ["subgroups", ...shared], workgroups: [Math.ceil(count / 8)],
  });
}

/** Makes a product that takes a dense weight take block-quantised ones too. */
export function orBlocks<W extends unknown[]>(
  dense: Op<[x: Tensor, weight: Tensor, ...rest: W], Tensor>,
  blocks: (x: Tensor, weight: BlockTensor, ...rest: W) => Tensor,
): Op<[x: Tensor, weight: Tensor | BlockTensor, ...rest: W], Tensor> {
  const call = (x: Tensor, weight: Tensor | BlockTensor, ...rest: W): Tensor =>
    weight instanceof BlockTensor ? blocks(x, weight, ...rest) : dense(x, weight, ...rest);
  return Object.assign(call, {
    opName: dense.opName, mutates: dense.mutates, differentiable: dense.differentiable,
  });
}
