/** The matrix products that ops are made of: the choice of a kernel and its layout. Not an op itself. */
import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import { type HalfDType, isHalf, type Tensor, type TensorDType } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { cast, convert } from "./cast.ts";
import {
  matrixUnit, productCandidates, type ProductDTypes, productKernel, type ProductKernel, TILE,
} from "./product_kernels.ts";
import { sumParts } from "./sum_rows.ts";

/** Number formats of factors and results. */
export type FloatDType = "f32" | HalfDType;

/** A matrix, or a batch of them, inside a tensor: strides and offset in elements. */
export interface Matrix {
  readonly tensor: Tensor;
  readonly row: number;
  readonly col: number;
  readonly batch?: number;
  readonly offset?: number;
}

/**
 * c = a b: a [m, k], b [k, n], c [m, n] with neighbouring columns, `batches` times; each f32, f16 or bf16.
 * Sums are f32; the epilogue is, in this order: bias, relu2, relu2_of, residual, accumulate.
 */
export interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batches?: number;
  readonly a: Omit<Matrix, "offset">;
  readonly b: Matrix;
  readonly c: Omit<Matrix, "col">;
  /** f32 [n], added to every row. */
  readonly bias?: Tensor | null;
  /** max(x, 0)^2 of every element. */
  readonly relu2?: boolean;
  /** f32 of c's layout, max(h, 0)^2: multiplies by the derivative 2 max(h, 0). Excludes `residual`. */
  readonly relu2_of?: Tensor | null;
  /** f32 of c's layout, added. */
  readonly residual?: Tensor | null;
  /** c += a b instead of c = a b. */
  readonly accumulate?: boolean;
  /** Row tiles from `groupedTiles`: each names its rows and the matrix of b. */
  readonly tiles?: Tensor;
  /** u32 [batches + 1]: matrix e of c sums over k in offsets[e] .. offsets[e + 1]. */
  readonly offsets?: Tensor;
  /** u32: row r of a (of b, with `offsets`) is row floor(table[r] / per) of what is stored. */
  readonly gather?: { readonly table: Tensor; readonly per: number } | null;
  readonly kernel?: ProductKernel | undefined;
}

/**
 * A sum over k is split where there are fewer workgroups, but not into parts shorter than `part`: on a
 * processor another launch costs as much as a long loop.
 */
const SPLITS = { quad: { wanted: 4, part: 2048 }, tile: { wanted: 128, part: 128 } } as const;
const WG = 32; // of grouped_tiles

/** What the choice of a product's kernel depends on; `trans` as in matmul, number formats of a, b and c. */
type ProductShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly batches: number;
  readonly transA: boolean; readonly transB: boolean; readonly dtypes: string;
};

/** The number formats in the text of a class, and back. */
export const dtypesText = ({ a, b, c }: ProductDTypes): string => `${a}.${b}.${c}`;
export function dtypesOf(text: string): ProductDTypes {
  const [a, b, c] = text.split(".") as [TensorDType, TensorDType, TensorDType];
  return { a, b, c };
}

/** What kernels may differ by: the order of a sum over k, and the rounding of the result. */
export function productTolerance(k: number, { c }: ProductDTypes): number {
  return 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24 + (c === "f16" ? 2 ** -9 : c === "bf16" ? 2 ** -7 : 0);
}

/** The kernel of a product without groups. */
const productTuning = defineTunable({
  name: "matmul/product",
  classOf: (shape: ProductShape) => ({
    ...shape, m: bucket(shape.m), n: bucket(shape.n), k: bucket(shape.k), batches: bucket(shape.batches, 64),
  }),
  candidates: (device: Device, { m, n, dtypes }) => productCandidates(device, m, n, dtypesOf(dtypes)),
  fallback: (device, { m, n, batches }): ProductKernel => {
    if (device.info.isSoftware) return productKernel(device);
    // Large tiles need enough workgroups to occupy a GPU.
    const large = Math.min(m, n) >= 128 && Math.ceil(m / 128) * Math.ceil(n / 128) * batches >= 64;
    return large ? "tile_large" : "tile";
  },
  trial: (device, { m, n, k, batches, transA, transB, dtypes }) => trial(() => {
    const { a, b } = dtypesOf(dtypes);
    return {
      a: converted(randomTensor(device, [batches, m, k], 0, k ** -0.25), a as FloatDType),
      b: converted(randomTensor(device, [batches, k, n], 1, k ** -0.25), b as FloatDType),
    };
  }, ({ a, b }, kernel: ProductKernel) => {
    const c = device.empty([batches, m, n], dtypesOf(dtypes).c);
    const [a_row, a_col, b_row, b_col] = [transA ? 1 : k, transA ? m : 1, transB ? 1 : n, transB ? k : 1];
    product({
      m, n, k, batches, kernel, a: { tensor: a, row: a_row, col: a_col, batch: m * k },
      b: { tensor: b, row: b_row, col: b_col, batch: k * n }, c: { tensor: c, row: n, batch: m * n },
    });
    return c;
  }),
  tolerance: ({ k, dtypes }) => productTolerance(k, dtypesOf(dtypes)),
});

/** Records a product. */
export function product(p: Product): void {
  const { m, n, a, b, c, batches = 1 } = p;
  const { device } = c.tensor;
  const dtypes = { a: a.tensor.dtype, b: b.tensor.dtype, c: c.tensor.dtype };
  const kernel = p.kernel ? productKernel(device, p.kernel, dtypes) : choose(device, productTuning, {
    m, n, k: p.k, batches, transA: a.col !== 1, transB: b.col !== 1, dtypes: dtypesText(dtypes),
  });
  const { size } = TILE[kernel];
  const rows4 = kernel === "quad" && m <= 4 && !p.tiles;
  const row_tiles = p.tiles ? p.tiles.shape[0]! : Math.ceil(m / (rows4 ? 4 : size));
  const tiles = row_tiles * Math.ceil(n / size) * batches;
  const splits = splitsOf(p, kernel, tiles);
  const plan = { kernel, rows4, row_tiles, tiles, splits };
  // Halves are written in whole vectors: a pair that two invocations share would be torn.
  const indirect = isHalf(c.tensor.dtype) && (
    splits > 1 || p.accumulate || !inVectors(c, c.row) || n % 4 !== 0);
  const whole = indirect ? device.empty(c.tensor.shape) : c.tensor;
  if (indirect && p.accumulate) convert(c.tensor, whole);
  if (splits === 1) run(p, plan, { ...c, tensor: whole });
  else {
    const parts = device.empty([splits, batches * m, n]);
    run(p, plan, { tensor: parts, row: n, batch: m * n });
    sumParts(parts, splits, batches * m * n, 1, splits, whole, p.accumulate === true);
  }
  if (indirect) convert(whole, c.tensor);
}

interface Plan {
  readonly kernel: ProductKernel;
  readonly rows4: boolean;
  readonly row_tiles: number;
  readonly tiles: number;
  readonly splits: number;
}

/** A long sum with few tiles is cut into parts: c must then be the whole tensor, and nothing else be done. */
function splitsOf(p: Product, kernel: ProductKernel, tiles: number): number {
  const { m, n, k, c, batches = 1 } = p;
  const whole = !c.offset && c.tensor.size === batches * m * n;
  if (p.bias || p.relu2 || p.relu2_of || p.residual || p.tiles || p.offsets || !whole ||
    tiles === 0) return 1;
  const workgroups = tiles / TILE[kernel].per_workgroup;
  const { wanted, part } = SPLITS[kernel === "quad" ? kernel : "tile"];
  return Math.max(1, Math.min(Math.ceil(wanted / workgroups), Math.floor(k / part), 16));
}

function run(p: Product, { kernel, rows4, row_tiles, tiles, splits }: Plan, c: Product["c"]): void {
  const { m, n, k, a, b, batches = 1, bias, relu2_of, residual, gather } = p;
  const none = b.tensor; // every binding must hold something
  const options = {
    bind: {
      a: a.tensor, b: b.tensor, c: c.tensor, bias: bias ?? none, tiles: p.tiles ?? p.offsets ?? none,
      table: gather?.table ?? none, extra: relu2_of ?? residual ?? none,
    },
    params: {
      m, n, k, batches, row_tiles, splits, split_k: Math.ceil(k / splits / 4) * 4,
      a_row: a.row, a_col: a.col, a_batch: a.batch ?? 0,
      b_row: b.row, b_col: b.col, b_batch: b.batch ?? 0,
      c_row: c.row, c_batch: c.batch ?? 0, c_split: batches * m * n,
      b_offset: b.offset ?? 0, c_offset: c.offset ?? 0, per: gather?.per ?? 1,
      stored: gather ? Math.max(1, Math.floor(p.offsets ? b.tensor.size / b.row : a.tensor.size / a.row)) : 1,
    },
    workgroups: [Math.ceil((tiles * splits) / TILE[kernel].per_workgroup)] as [number],
  };
  const k_tail = k % 4 !== 0 || p.offsets !== undefined;
  const [half_a, half_b, half_c] = [a, b, c].map(({ tensor }) => isHalf(tensor.dtype));
  const shared = conditions({
    a_half: half_a!, b_half: half_b!, c_half: half_c!, a_bf16: a.tensor.dtype === "bf16",
    b_bf16: b.tensor.dtype === "bf16", c_bf16: c.tensor.dtype === "bf16",
    bias: !!bias, relu2: p.relu2 === true, relu2_of: !!relu2_of, residual: !!residual,
    accumulate: p.accumulate === true && splits === 1,
    grouped_rows: p.tiles !== undefined, grouped_k: p.offsets !== undefined,
    gather_a: !!gather && !p.offsets, gather_b: !!gather && !!p.offsets,
    c_vec: n % 4 === 0 && inVectors(c, c.row),
  });
  const a_along_k = a.col === 1;
  const b_along_k = b.row === 1 && b.col !== 1;
  const a_vec_k = a_along_k && !p.offsets && inVectors(a, a.row);
  const b_vec_k = b.row === 1 && !k_tail && inVectors(b, b.col);
  const b_vec_n = b.row !== 1 && b.col === 1 && inVectors(b, b.row);
  if (kernel === "quad") {
    const a_vec_m = !a_along_k && a.row === 1 && !b_vec_k && inVectors(a, a.col);
    const layout = conditions({ a_vec_k, a_vec_m, b_vec_n, b_vec_k, k_tail, rows4 });
    return launch("matmul/matmul_quad", {
      ...options, params: { ...options.params, group: 4, groups: rows4 ? 1 : 4 },
      conditions: ["subgroups", ...shared, ...layout],
    });
  }
  const a_vec = a_along_k ? a_vec_k && !k_tail : a.row === 1 && inVectors(a, a.col);
  const layout = conditions({ a_along_k, b_along_k, a_vec, b_vec: b_along_k ? b_vec_k : b_vec_n });
  const large = TILE[kernel].size === 128 ? ["large" as const] : [];
  if (kernel === "matrix" || kernel === "matrix_large") {
    const unit = matrixUnit(c.tensor.device, { a: a.tensor.dtype, b: b.tensor.dtype, c: c.tensor.dtype });
    return launch("matmul/matmul_matrix", {
      ...options, constants: { SUBGROUP: unit.subgroup, WG: unit.subgroup * (large.length > 0 ? 8 : 4) },
      conditions: [...shared, ...layout, ...large, ...conditions({
        m8: unit.M === 8, n8: unit.N === 8, k8: unit.K === 8, f16: unit.f16,
        subgroup_matrix: unit.native,
      })],
    });
  }
  const f16 = kernel.endsWith("_f16") ? ["f16" as const] : [];
  launch("matmul/matmul_tile", { ...options, conditions: [...shared, ...layout, ...large, ...f16] });
}

/** x in another number format; x itself where it has that format. */
export function converted(x: Tensor, dtype: FloatDType): Tensor {
  return x.dtype === dtype ? x : cast(x, dtype);
}

/**
 * The format of a product: what was asked for, or that of both factors where they are the same half, or f32.
 */
export function productDType(a: Tensor, b: Tensor, wanted: FloatDType | undefined): FloatDType {
  return wanted ?? (isHalf(a.dtype) && a.dtype === b.dtype ? a.dtype : "f32");
}

/** Whether all rows (or columns) of a matrix begin at multiples of four elements, to be read in vectors. */
function inVectors({ tensor, batch = 0, offset = 0 }: Omit<Matrix, "row" | "col">, stride: number): boolean {
  return [stride, batch, offset, tensor.size].every((elements) => elements % 4 === 0);
}

/** The names of the conditions that hold. */
export function conditions<C extends string>(held: Readonly<Record<C, boolean>>): C[] {
  return (Object.keys(held) as C[]).filter((condition) => held[condition]);
}

/** What happens to the elements of a product before they are stored, as in `Product`. */
export type Epilogue = Pick<Product, "bias" | "relu2" | "residual">;

/** Where the rows of experts begin that have as many as one another, for trials: u32 [experts + 1]. */
export function evenOffsets(device: Device, rows: number, experts: number): Tensor {
  const ends = Uint32Array.from({ length: experts + 1 }, (_, e) => Math.floor((e * rows) / experts));
  return device.tensor(ends, [experts + 1]);
}

/** Cuts the rows of every expert into tiles: u32 [count, 4] of (expert, first row, end row, 0). */
export function groupedTiles(offsets: Tensor, rows: number, tile_rows: number): Tensor {
  const experts = offsets.size - 1;
  const count = Math.min(rows, Math.floor((rows + experts * (tile_rows - 1)) / tile_rows));
  const tiles = offsets.device.empty([count, 4], "u32");
  launch("matmul/grouped_tiles", {
    bind: { offsets, tiles }, params: { experts, rows, tile_rows, count },
    workgroups: [Math.ceil(count / WG)],
  });
  return tiles;
}
