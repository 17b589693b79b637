/** The products of grouped_linear and of its gradients, and the choice of their kernels. Not an op itself. */
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import {
  converted, dtypesOf, dtypesText, evenOffsets, type FloatDType, groupedTiles, product, productTolerance,
} from "./gemm.ts";
import { isVectorKernel, readsInVectors, type VectorKernel, vectorProduct } from "./matvec.ts";
import { moe_permute } from "./moe.ts";
import { productCandidates, productKernel, type ProductKernel, tileRows } from "./product_kernels.ts";

/** Kernels of a grouped product: matvec takes rows one by one, and computes the forward pass alone. */
export type GroupedKernel = ProductKernel | Exclude<VectorKernel, "matvec_split">;

/** Rows in the order of tokens, as in grouped_linear. */
export interface Permutation {
  readonly slot_token: Tensor;
  readonly token_slot: Tensor;
  readonly topk: number;
}

/**
 * forward  out [S, N] = left [S, K] right[e]^T, right [E, N, K]
 * inputs   out [S, K] = left [S, N] right[e], right [E, N, K]
 * weights  out [E, N, K] = left^T right over the rows of every expert; left [S, N], right [S, K]
 */
export interface GroupedProduct {
  readonly pass: "forward" | "inputs" | "weights";
  readonly left: Tensor;
  readonly right: Tensor;
  readonly out: Tensor;
  readonly offsets: Tensor;
  /** Where `forward` has its left, and `weights` its right factor in the order of tokens. */
  readonly permute?: Permutation | undefined;
  /** From `expert_tiles` for the same offsets. */
  readonly tiles?: Tensor | null | undefined;
  /** The offsets may end before the last row, and `permute` may have choices without a row. */
  readonly spare?: boolean;
  readonly relu2?: boolean;
  /** As in `Product`; of `inputs`. */
  readonly relu2_of?: Tensor | null;
  readonly residual?: Tensor | null;
  readonly kernel?: GroupedKernel | undefined;
}

/** Up to so many rows are taken one by one: experts then have about one row each. */
const FEW_ROWS = 8;
/** So many are measured so. */
const FEW_TRIED = 64;

type GroupedShape = {
  readonly pass: GroupedProduct["pass"]; readonly rows: number; readonly experts: number;
  readonly n: number; readonly k: number; readonly dtypes: string;
};

const groupedTuning = defineTunable({
  name: "matmul/grouped",
  classOf: (shape: GroupedShape) => ({
    ...shape, rows: bucket(shape.rows), experts: bucket(shape.experts, 256), n: bucket(shape.n),
    k: bucket(shape.k),
  }),
  candidates: (device: Device, shape): GroupedKernel[] => {
    const { pass, rows, experts, n, k, dtypes } = shape;
    // Tiles hold rows of one expert, or for the gradient of the weights whole matrices.
    const [across, down] = pass === "weights" ? [n, k] : [Math.ceil(rows / Math.max(experts, 1)),
      pass === "inputs" ? k : n];
    return [
      ...productCandidates(device, across, down, dtypesOf(dtypes)),
      ...(takesRows(shape) && rows <= FEW_TRIED ? ["matvec" as const, "matvec_quad" as const] : []),
    ];
  },
  fallback: (device, shape) => {
    if (shape.rows > FEW_ROWS || !takesRows(shape)) return productKernel(device);
    return device.info.isSoftware ? "matvec_quad" : "matvec";
  },
  trial: (device, { pass, rows, experts, n, k, dtypes }) => trial(() => {
    const formats = dtypesOf(dtypes);
    const deviation = (pass === "inputs" ? n : k) ** -0.25;
    const make = (shape: number[], stream: number, dtype: string) =>
      converted(randomTensor(device, shape, stream, deviation), dtype as FloatDType);
    return {
      left: make([rows, pass === "forward" ? k : n], 0, formats.a),
      right: make(pass === "weights" ? [rows, k] : [experts, n, k], 1, formats.b),
      offsets: evenOffsets(device, rows, experts),
    };
  }, ({ left, right, offsets }, kernel: GroupedKernel) => {
    const shape = pass === "weights" ? [experts, n, k] : [rows, pass === "inputs" ? k : n];
    const out = device.empty(shape, dtypesOf(dtypes).c);
    groupedProduct({ pass, left, right, out, offsets, kernel });
    return out;
  }),
  tolerance: ({ pass, rows, n, k, dtypes }) =>
    productTolerance({ forward: k, inputs: n, weights: rows }[pass], dtypesOf(dtypes)),
});

/**
 * How rows are cut into tiles of one expert each, for several calls of grouped_linear with the same offsets;
 * null for so few rows that none are needed.
 */
export function expert_tiles(offsets: Tensor, rows: number): Tensor | null {
  if (rows <= FEW_ROWS) return null;
  const height = tileRows(productKernel(offsets.device));
  return shardedOf(localsOf(offsets).map((local) => groupedTiles(local, rows, height)));
}

/** Whether matvec kernels compute it: as in `readsInVectors`. */
function takesRows({ pass, k, dtypes }: GroupedShape): boolean {
  const { a, b } = dtypesOf(dtypes);
  return pass === "forward" && a === "f32" && (b === "f32" || k % 4 === 0);
}

/** Records one of the products. */
export function groupedProduct(p: GroupedProduct): void {
  const { pass, left, right, out, offsets, permute, relu2 = false, relu2_of = null, residual = null } = p;
  const { device } = out;
  const [n, k] = (pass === "weights" ? out : right).shape.slice(1) as [number, number];
  const rows = pass === "weights" ? left.shape[0]! : out.shape[0]!;
  const dtypes = { a: left.dtype, b: right.dtype, c: out.dtype };
  const chosen = p.kernel ?? choose(device, groupedTuning, {
    pass, rows, experts: offsets.size - 1, n, k, dtypes: dtypesText(dtypes),
  });
  if (isVectorKernel(chosen) && pass === "forward" && readsInVectors(left, right)) {
    const plan = permute && { offsets, ...permute, spare: p.spare ?? false };
    const x = plan ? moe_permute(left, plan, plan.topk) : left;
    return vectorProduct(chosen, x, right, out, { relu2 }, offsets);
  }
  const kernel = productKernel(device, chosen, dtypes);
  const gather = permute ? { table: permute.slot_token, per: permute.topk } : null;
  if (pass === "weights") {
    return product({
      m: n, n: k, k: rows, batches: offsets.size - 1, a: { tensor: left, row: 1, col: n },
      b: { tensor: right, row: k, col: 1 }, c: { tensor: out, row: k, batch: n * k }, offsets, kernel, gather,
    });
  }
  const fits = tileRows(kernel) === tileRows(productKernel(device));
  const tiles = (fits ? p.tiles : null) ?? groupedTiles(offsets, rows, tileRows(kernel));
  const forward = pass === "forward";
  const [width, inner] = forward ? [n, k] : [k, n];
  product({
    m: rows, n: width, k: inner, a: { tensor: left, row: inner, col: 1 },
    b: { tensor: right, ...(forward ? { row: 1, col: k } : { row: k, col: 1 }), batch: n * k },
    c: { tensor: out, row: width }, tiles, kernel, gather,
    relu2, relu2_of, residual,
  });
}
