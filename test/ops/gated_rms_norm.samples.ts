import { gated_rms_norm } from "../../src/ops/gated_rms_norm.ts";
import * as ref from "../../src/reference/gated_rms_norm.ts";
import { type Draw, opSamples } from "./suite.ts";

const args = (shape: number[], ngroups: number, deviation = 1) => (r: Draw) =>
  [r.normal(shape, deviation), r.normal(shape, 2), r.uniform([shape.at(-1)!], 0.5, 1.5), ngroups, 1e-5];

export default opSamples({
  op: gated_rms_norm, reference: ref.gated_rms_norm, vjp: ref.gated_rms_norm_vjp,
  samples: [
    { name: "no rows", args: args([0, 16], 2) },
    { name: "one row, one group", args: args([12], 1) },
    { name: "one row, two groups", args: args([1, 1, 16], 2) },
    { name: "odd groups, few rows", args: args([2, 5, 27], 3) },
    { name: "odd groups, many rows", args: args([3, 19, 27], 3) },
    { name: "groups of whole vec4s, many rows", args: args([2, 35, 64], 4) },
    { name: "rows in whole fours", args: args([4, 16, 24], 2) },
    { name: "more rows than one part of the weight gradient", args: args([133, 8], 2), reduction: 133 },
    { name: "a wide group", args: args([2, 2112], 2), reduction: 1056 },
    { name: "groups of one channel", args: args([40, 4], 4) },
    { name: "small values, where eps counts", args: args([40, 16], 2, 1e-3) },
    {
      name: "a closed gate",
      args: (r) => [r.normal([40, 8]), r.uniform([40, 8], -60, -40), r.normal([8]), 2, 1e-5],
    },
  ],
  errors: [
    {
      name: "another gate", args: (r) => [r.normal([2, 8]), r.normal([2, 4]), r.normal([8]), 2, 1e-5],
      message: /gated_rms_norm: z must be \[2, 8\], found \[2, 4\]/,
    },
    {
      name: "a weight per group", args: (r) => [r.normal([2, 8]), r.normal([2, 8]), r.normal([4]), 2, 1e-5],
      message: /gated_rms_norm: weight must be \[8\], found \[4\]/,
    },
    {
      name: "groups that do not divide",
      args: (r) => [r.normal([2, 8]), r.normal([2, 8]), r.normal([8]), 3, 1e-5],
      message: /gated_rms_norm: ngroups must be a divisor of 8, found 3/,
    },
  ],
});
