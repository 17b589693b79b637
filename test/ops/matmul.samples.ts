import { matmul } from "../../src/ops/matmul.ts";
import * as ref from "../../src/reference/matmul.ts";
import { rounded } from "./halves.ts";
import { type Draw, type HostTensor, opSamples, type Sample } from "./suite.ts";

const orders = [[false, false], [false, true], [true, false], [true, true]] as const;

/** One product in every order of storage. */
function every(name: string, lead: number[], [M, N, K]: [number, number, number], options = {}): Sample[] {
  return orders.map(([transA, transB]) => ({
    name: `${name} ${transA ? "T" : "N"}${transB ? "T" : "N"}`,
    args: (r: Draw) => [
      r.normal([...lead, ...(transA ? [K, M] : [M, K])]), r.normal([...lead, ...(transB ? [N, K] : [K, N])]),
      { transA, transB, ...options },
    ],
    reduction: Math.max(M, N, K),
  }));
}

/** The same of two halves, into the same half. */
function halves(name: string, sizes: [number, number, number], dtype: "f16" | "bf16", options = {}): Sample[
  ] {
  return every(name, [], sizes, options).map((sample) => ({
    ...sample, ...rounded(dtype),
    args: (r) => sample.args(r).map((arg, i) => i < 2 ? r.half(arg as HostTensor, dtype) : arg),
  }));
}

/** Products in f16: a few of their sums are rounded too. */
const looser = (sample: Sample): Sample => ({ ...sample, tolerance: 2 ** -9 });

/** A batch of A times one B. */
function sharedB(transA: boolean, transB: boolean): Sample {
  return {
    name: `one B for a batch, ${transA ? "T" : "N"}${transB ? "T" : "N"}`,
    args: (r) => [
      r.normal(transA ? [2, 3, 8, 5] : [2, 3, 5, 8]), r.normal(transB ? [12, 8] : [8, 12]),
      { transA, transB },
    ],
    reduction: 30,
  };
}

export default opSamples({
  op: matmul, reference: ref.matmul, vjp: ref.matmul_vjp,
  samples: [
    ...every("whole vectors", [], [20, 36, 24]),
    ...every("odd", [], [17, 19, 23]),
    ...every("odd rows, whole columns", [], [33, 20, 21]),
    ...every("a long sum", [], [5, 4, 4100]),
    ...every("several tiles", [], [70, 68, 40]),
    ...every("batch", [2, 3], [5, 8, 12]),
    ...every("workgroup tile, odd", [], [67, 70, 19], { kernel: "tile" }),
    ...every("workgroup tile, batch", [3], [16, 20, 36], { kernel: "tile" }),
    ...every("registers, odd", [], [67, 70, 19], { kernel: "quad" }),
    ...every("large workgroup tile, odd", [], [131, 134, 19], { kernel: "tile_large" }),
    ...every("large workgroup tile, whole vectors", [2], [20, 132, 24], { kernel: "tile_large" }),
    ...every("matrix units, odd", [], [67, 70, 19], { kernel: "matrix" }),
    ...halves("f16, large matrix units", [132, 20, 40], "f16", { kernel: "matrix_large" }).slice(1, 2),
    ...halves("f16, products in f16", [20, 68, 24], "f16", { kernel: "tile_f16" }).map(looser),
    ...halves("f16, large products in f16, odd", [17, 133, 23], "f16", { kernel: "tile_large_f16" })
      .slice(1, 2).map(looser),
    {
      // 16 products of 2^12 leave the range of f16, and nothing of them is left in the end.
      name: "f16, products past the range of f16", tolerance: 2 ** -10,
      args: (r) => [
        r.half(r.of([2, 36], [...Array<number>(18).fill(300), ...Array<number>(18).fill(-300),
          ...Array<number>(36).fill(1)]), "f16"),
        r.half(r.of([36, 4], Array<number>(144).fill(301)), "f16"), { kernel: "tile_f16" },
      ],
    },
    ...(["f16", "bf16"] as const).flatMap((dtype) => [
      ...halves(`${dtype}, whole vectors`, [20, 36, 24], dtype),
      ...halves(`${dtype}, odd`, [17, 19, 23], dtype),
      ...halves(`${dtype}, workgroup tile`, [20, 68, 24], dtype, { kernel: "tile" }),
      ...halves(`${dtype}, workgroup tile, odd`, [17, 69, 23], dtype, { kernel: "tile" }),
      ...halves(`${dtype}, matrix units, odd`, [67, 69, 35], dtype, { kernel: "matrix" }).slice(1, 3),
      {
        name: `${dtype} into f32`,
        args: (r: Draw) => [r.half(r.normal([20, 24]), dtype), r.half(r.normal([24, 36]), dtype),
          { out: "f32" }],
      },
      {
        name: `f32 and ${dtype}`,
        args: (r: Draw) => [r.normal([20, 24]), r.half(r.normal([24, 36]), dtype), {}],
      },
      {
        name: `long sum in ${dtype}`, reduction: 1030, ...rounded(dtype),
        args: (r: Draw) => [
          r.half(r.normal([1030, 8]), dtype), r.half(r.normal([1030, 12]), dtype), { transA: true },
        ],
      },
      {
        name: `f32 into ${dtype}`, ...rounded(dtype),
        args: (r: Draw) => [r.normal([2, 20, 24]), r.normal([2, 24, 36]), { out: dtype }],
      },
    ]),
    {
      name: "f16 and bf16",
      args: (r) => [r.half(r.normal([20, 24]), "f16"), r.half(r.normal([24, 36]), "bf16"), {}],
    },
    ...orders.map(([transA, transB]) => sharedB(transA, transB)),
    {
      name: "long sum", reduction: 1030,
      args: (r) => [r.normal([1030, 8]), r.normal([1030, 12]), { transA: true }],
    },
    {
      name: "long sum, workgroup tile", reduction: 1030,
      args: (r) => [r.normal([1030, 9]), r.normal([1030, 13]), { transA: true, kernel: "tile" }],
    },
    { name: "three rows", args: (r) => [r.normal([3, 21]), r.normal([21, 10]), {}] },
    { name: "one row", args: (r) => [r.normal([1, 64]), r.normal([10, 64]), { transB: true }] },
    { name: "one row, odd", args: (r) => [r.normal([1, 37]), r.normal([9, 37]), { transB: true }] },
    {
      name: "matvec", reduction: 144,
      args: (r) => [r.normal([3, 144]), r.normal([10, 144]), { transB: true, kernel: "matvec" }],
    },
    {
      name: "matvec, odd",
      args: (r) => [r.normal([3, 37]), r.normal([9, 37]), { transB: true, kernel: "matvec" }],
    },
    {
      name: "matvec_split", reduction: 1040,
      args: (r) => [r.normal([3, 1040]), r.normal([10, 1040]), { transB: true, kernel: "matvec_split" }],
    },
    {
      name: "matvec_split, odd", reduction: 1037,
      args: (r) => [r.normal([2, 1037]), r.normal([9, 1037]), { transB: true, kernel: "matvec_split" }],
    },
    {
      name: "matvec_split of a short sum",
      args: (r) => [r.normal([1, 36]), r.normal([9, 36]), { transB: true, kernel: "matvec_split" }],
    },
    {
      name: "matvec_quad",
      args: (r) => [r.normal([3, 37]), r.normal([9, 37]), { transB: true, kernel: "matvec_quad" }],
    },
    { name: "one by one", args: (r) => [r.normal([1, 1]), r.normal([1, 1]), {}] },
    { name: "no rows", args: (r) => [r.normal([0, 8]), r.normal([8, 4]), {}] },
    { name: "no columns", args: (r) => [r.normal([3, 8]), r.normal([8, 0]), {}] },
    { name: "an empty sum", args: (r) => [r.normal([2, 3, 0]), r.normal([0, 4]), {}] },
    { name: "an empty batch", args: (r) => [r.normal([0, 3, 8]), r.normal([8, 4]), { transA: false }] },
  ],
  errors: [
    {
      name: "different inner extents", message: /matmul.*b must be.*4, N.*\[5, 3\]/,
      args: (r) => [r.normal([2, 4]), r.normal([5, 3]), {}],
    },
    {
      name: "different batches", message: /matmul.*b must be \[2, 4, N\].*\[3, 4, 3\]/,
      args: (r) => [r.normal([2, 2, 4]), r.normal([3, 4, 3]), {}],
    },
    {
      name: "a vector", message: /matmul.*a must be.*found \[4\]/,
      args: (r) => [r.normal([4]), r.normal([4, 3]), {}],
    },
    {
      name: "a matvec over columns", args: (r) => [r.normal([1, 4]), r.normal([4, 3]), { kernel: "matvec" }],
      message: /matmul.*matvec/,
    },
  ],
});
