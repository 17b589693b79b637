import { adamw } from "../../src/ops/adamw.ts";
import * as ref from "../../src/reference/adamw.ts";
import { type Draw, type HostTensor, opSamples } from "./suite.ts";

/** The same with moments that are stored as bf16, or of 8 bits and all zero. */
const inFormat = (sample: (r: Draw) => HostTensor[], format: "bf16" | "8bit") => (r: Draw) => {
  const given = sample(r);
  const blocks = Math.ceil(given[0]!.data.length / 64);
  return given.map((tensor, i) => i !== 2 && i !== 3 ? tensor : format === "bf16" ? r.half(tensor, "bf16")
    : r.of([17 * blocks], new Array<number>(17 * blocks).fill(0), "u32"));
};

/** The state after `step - 1` earlier steps; the corrections belong to the betas as f32 holds them. */
const args = (size: number, rows: readonly number[], step: number, scale = 1) => (r: Draw) => {
  const [beta1, beta2] = [Math.fround(0.9), Math.fround(0.999)];
  const hyper = [3e-3, beta1, beta2, 1e-8, 0.1, 1 - beta1 ** step, 1 - beta2 ** step, 0];
  const started = step > 1 ? 1 : 0;
  const [m, v] = [r.normal([size], 0.1 * started), r.uniform([size], 0, 0.01 * started)];
  const table = r.of([rows.length / 3, 3], rows, "u32");
  return [r.normal([size]), r.normal([size], 0.1), m, v, table, r.of([8], hyper), r.of([1], [scale])];
};

/** A call with tensors of these shapes. */
const shaped = (r: Draw, param: number[], grad: number[], table: number[], hyper: number[]) => [
  r.normal(param), r.normal(grad), r.normal(param), r.normal(param), r.integers(table, 0, 1, "u32"),
  r.normal(hyper), r.normal([1]),
];

export default opSamples({
  op: adamw, reference: ref.adamw,
  samples: [
    { name: "no elements", args: args(0, [], 1) },
    { name: "no slabs", args: args(8, [], 1) },
    { name: "the first step", args: args(96, [0, 24, 1], 1) },
    { name: "a later step", args: args(260, [0, 65, 1], 100) },
    { name: "without decay", args: args(64, [0, 16, 0], 3) },
    { name: "a clipped gradient", args: args(64, [0, 16, 1], 3, 0.01) },
    { name: "a step that is skipped", args: args(64, [0, 16, 1], 3, -1) },
    {
      name: "moments in bf16", args: inFormat(args(260, [0, 65, 1], 3), "bf16"), tolerance: 2 ** -7,
    },
    {
      name: "parameters in bf16",
      args: (r) => args(132, [0, 33, 1], 3)(r).map((tensor, i) => i === 0 ? r.half(tensor, "bf16") : tensor),
      tolerance: 2 ** -7,
    },
    {
      // Numbers for which f32 arithmetic is exact, and so are the codes.
      name: "moments of 8 bits",
      args: (r) => inFormat(args(132, [0, 33, 1], 1), "8bit")(r)
        .with(1, r.of([132], Array.from({ length: 132 }, (_, i) => i % 3 === 0 ? -2 : 2)))
        .with(5, r.of([8], [1e-3, 0.5, 0.75, 1e-8, 0.1, 0.5, 0.25, 6])),
    },
    { name: "one vector", args: args(4, [0, 1, 1], 2) },
    { name: "slabs and gaps", args: args(4120, [0, 1, 0, 16, 576, 1, 576, 1029, 0], 2) },
    { name: "an empty slab", args: args(16, [2, 2, 1, 0, 1, 1], 2) },
    {
      name: "a gradient of zero",
      args: (r) => args(12, [0, 3, 1], 1)(r).with(1, r.normal([12], 0)),
    },
  ],
  errors: [
    {
      name: "parameters that are no whole vectors",
      args: (r) => shaped(r, [6], [6], [1, 3], [8]),
      message: /adamw.*param.*multiple of 4.*\[6\]/,
    },
    {
      name: "a gradient of another shape",
      args: (r) => shaped(r, [4], [2, 2], [1, 3], [8]),
      message: /adamw.*grad.*\[4\].*\[2, 2\]/,
    },
    {
      name: "a table of another width",
      args: (r) => shaped(r, [4], [4], [1, 2], [8]),
      message: /adamw.*table.*\[slabs, 3\].*\[1, 2\]/,
    },
    {
      name: "a table of signed numbers",
      args: (r) => shaped(r, [4], [4], [1, 3], [8]).with(4, r.integers([1, 3], 0, 1)),
      message: /adamw.*table.*u32.*i32/,
    },
    {
      name: "moments of two formats",
      args: (r) => shaped(r, [4], [4], [1, 3], [8]).with(3, r.half(r.normal([4]), "bf16")),
      message: /adamw.*v must be f32.*bf16/,
    },
    {
      name: "moments of 8 bits without their scales",
      args: (r) => shaped(r, [64], [64], [1, 3], [8]).with(2, r.integers([16], 0, 1, "u32")),
      message: /adamw.*m.*\[17\].*\[16\]/,
    },
    {
      name: "masters of parameters that are f32",
      args: (r) => [...shaped(r, [4], [4], [1, 3], [8]), r.integers([2], 0, 1, "u32")],
      message: /adamw.*param must be bf16.*f32/,
    },
    {
      name: "too few hyper-parameters",
      args: (r) => shaped(r, [4], [4], [1, 3], [7]),
      message: /adamw.*hyper.*\[8\].*\[7\]/,
    },
  ],
});
