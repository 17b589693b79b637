/** The kernels of matrix products: which a device can run, and on which matrix units. */
import type { Device } from "../tensor/device.ts";
import type { TensorDType } from "../tensor/tensor.ts";

/**
 * Kernels for a product: `quad` keeps 16 x 16 tiles in the registers of four invocations (software adapters),
 * `tile` and `tile_large` stage 64 x 64 and 128 x 128 tiles in workgroup memory (GPUs, and wherever there are
 * no subgroups); with `_f16` they multiply in f16 and add to f32, for results that are f16 anyway. `matrix`
 * and `matrix_large` multiply tiles of the same sizes on matrix units.
 */
export type ProductKernel =
  | "quad" | "tile" | "tile_large" | "tile_f16" | "tile_large_f16" | "matrix" | "matrix_large";

export const TILE: Readonly<Record<ProductKernel, { size: number; per_workgroup: number }>> = {
  quad: { size: 16, per_workgroup: 4 },
  tile: { size: 64, per_workgroup: 1 },
  tile_large: { size: 128, per_workgroup: 1 },
  tile_f16: { size: 64, per_workgroup: 1 },
  tile_large_f16: { size: 128, per_workgroup: 1 },
  matrix: { size: 64, per_workgroup: 1 },
  matrix_large: { size: 128, per_workgroup: 1 },
};

/** Rows per tile of a grouped product. */
export function tileRows(kernel: ProductKernel): number {
  return TILE[kernel].size;
}

/** Number formats of the factors and of the result. */
export interface ProductDTypes {
  readonly a: TensorDType;
  readonly b: TensorDType;
  readonly c: TensorDType;
}

/**
 * The kernel for products on a device: the wanted one where it can run, one of the same tile size where that
 * cannot, or the one that suits the adapter.
 */
export function productKernel(device: Device, wanted?: string, dtypes?: ProductDTypes): ProductKernel {
  const inHalves = dtypes !== undefined && multipliesInHalves(device, dtypes);
  switch (wanted) {
    case "tile": case "tile_large": case "matrix": return wanted;
    case "tile_f16": return inHalves ? wanted : "tile";
    case "tile_large_f16": return inHalves ? wanted : "tile_large";
    case "matrix_large": return dtypes && matrixUnit(device, dtypes).fits_large ? wanted : "matrix";
    default: return device.hasSubgroups && (wanted === "quad" || device.info.isSoftware) ? "quad" : "tile";
  }
}

/** Every kernel for products of m x n results. */
export function productCandidates(device: Device, m: number, n: number, dtypes: ProductDTypes):
  ProductKernel[] {
  const large = !device.info.isSoftware && Math.min(m, n) >= 128;
  const inHalves = multipliesInHalves(device, dtypes);
  const unit = matrixUnit(device, dtypes);
  return [
    ...(device.hasSubgroups ? ["quad" as const] : []), "tile" as const,
    ...(large ? ["tile_large" as const] : []),
    ...(inHalves ? ["tile_f16" as const, ...(large ? ["tile_large_f16" as const] : [])] : []),
    ...(unit.native ? ["matrix" as const] : []),
    ...(unit.native && unit.fits_large && large ? ["matrix_large" as const] : []),
  ];
}

/** Products of halves whose result is rounded to f16 may be added up in f16 for a few k. */
function multipliesInHalves(device: Device, { a, b, c }: ProductDTypes): boolean {
  return a === "f16" && b === "f16" && c === "f16" && device.gpuDevice.features.has("shader-f16");
}

/** How a device multiplies subgroup matrices of some number formats. */
export interface MatrixUnit {
  readonly M: number;
  readonly N: number;
  readonly K: number;
  /** What factors are staged in: f16 where both are stored so, else f32. */
  readonly f16: boolean;
  /** False where the kernel writes the products out, one invocation for a subgroup. */
  readonly native: boolean;
  /** Invocations of a subgroup; 1 where it is not native. */
  readonly subgroup: number;
  /** Tiles of 128 x 128 fit a workgroup. */
  readonly fits_large: boolean;
}

const FEATURE = "chromium-experimental-subgroup-matrix";

export function matrixUnit({ info, gpuDevice, hasSubgroups }: Device, { a, b }: ProductDTypes): MatrixUnit {
  const halves = a === "f16" && b === "f16" && gpuDevice.features.has("shader-f16");
  const listed = info.subgroupMatrices
    .filter(({ M, N, K, resultComponentType: result }) =>
      result === "f32" && [M, N, K].every((extent) => extent === 8 || extent === 16))
    .sort((x, y) => y.M * y.N * y.K - x.M * x.N * x.K);
  const find = (component: string) => listed.find(({ componentType }) => componentType === component);
  const found = (halves ? find("f16") : undefined) ?? find("f32");
  const size = subgroupSize(info);
  const native = found !== undefined && size !== null && hasSubgroups && gpuDevice.features.has(FEATURE);
  const f16 = found ? found.componentType === "f16" : halves;
  const subgroup = native ? size : 1;
  const { M, N, K } = found ?? { M: 16, N: 16, K: 16 };
  const most = gpuDevice.limits.maxComputeInvocationsPerWorkgroup;
  return { M, N, K, f16, native, subgroup, fits_large: f16 && 8 * subgroup <= most };
}

/** The one size of a device's subgroups; null where the driver may choose. Apple's GPUs have one of 32. */
function subgroupSize({ vendor, subgroupMinSize, subgroupMaxSize }: Device["info"]): number | null {
  if (vendor.toLowerCase() === "apple") return 32;
  return subgroupMinSize === subgroupMaxSize && subgroupMinSize > 0 ? subgroupMinSize : null;
}
