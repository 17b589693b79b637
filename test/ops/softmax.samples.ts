import { softmax } from "../../src/ops/softmax.ts";
import * as ref from "../../src/reference/softmax.ts";
import { type Draw, opSamples } from "./suite.ts";

const args = (shape: number[], deviation = 1) => (r: Draw) => [r.normal(shape, deviation)];

export default opSamples({
  op: softmax, reference: ref.softmax, vjp: ref.softmax_vjp,
  samples: [
    { name: "blocks of four vec4s and a rest", args: args([3, 1124]), reduction: 1124 },
    { name: "no rows", args: args([0, 16]) },
    { name: "no columns", args: args([3, 0]) },
    { name: "one row", args: args([16]) },
    { name: "one column", args: args([5, 1]) },
    { name: "odd sizes", args: args([3, 5, 37]) },
    { name: "an odd row of several blocks", args: args([2, 1031]), reduction: 1031 },
    { name: "a whole number of blocks", args: args([2, 2048]), reduction: 2048 },
    { name: "large values", args: (r) => [r.uniform([7, 260], 9997, 10003)] },
    { name: "equal values", args: (r) => [r.normal([3, 64], 0)] },
    {
      name: "a maximum that rises along the row",
      args: (r) => [r.of([2, 300], Array.from({ length: 600 }, (_, i) => (i % 300) / 4 - 40))],
    },
    {
      name: "masked entries",
      args: (r) => [r.of([2, 40], Array.from({ length: 80 }, (_, i) => (i % 3 === 0 ? -3e38 : r.next())))],
    },
  ],
  errors: [
    { name: "a scalar", args: (r) => [r.normal([])],
      message: /softmax: x must be \[\.\.\., N\], found \[\]/ },
  ],
});
