import { rms_norm } from "../../src/ops/rms_norm.ts";
import * as ref from "../../src/reference/rms_norm.ts";
import { type Draw, opSamples } from "./suite.ts";

const args = (shape: number[], deviation = 1, eps = 1e-5) => (r: Draw) =>
  [r.normal(shape, deviation), r.uniform([shape.at(-1)!], 0.5, 1.5), eps];

export default opSamples({
  op: rms_norm, reference: ref.rms_norm, vjp: ref.rms_norm_vjp,
  samples: [
    { name: "no rows", args: args([0, 16]) },
    { name: "one row", args: args([16]) },
    { name: "one column", args: args([5, 1], 1, 0.1) },
    { name: "odd sizes, few rows", args: args([3, 5, 37]) },
    { name: "odd sizes, many rows", args: args([7, 13, 37]) },
    { name: "many rows", args: args([2, 66, 32]), reduction: 132 },
    { name: "rows in whole fours", args: args([4, 16, 48]) },
    { name: "more rows than one part of the weight gradient", args: args([261, 12]), reduction: 261 },
    { name: "a wide row", args: args([2, 2056]), reduction: 2056 },
    { name: "small values, where eps counts", args: args([70, 24], 1e-3) },
    { name: "large values", args: args([70, 24], 1e4) },
    { name: "rows of zeros", args: (r) => [r.normal([66, 8], 0), r.normal([8]), 1e-5] },
  ],
  errors: [
    {
      name: "a weight of another width", args: (r) => [r.normal([2, 4]), r.normal([5]), 1e-5],
      message: /rms_norm: weight must be \[4\], found \[5\]/,
    },
  ],
});
