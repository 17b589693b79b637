import { adamw } from "../../src/ops/adamw.ts";
import * as ref from "../../src/reference/adamw.ts";
import { type Draw, opSamples } from "./suite.ts";

/** The state after `step - 1` earlier steps; the corrections belong to the betas as f32 holds them. */
const args = (shape: number[], step: number, decay: boolean, scale = 1) => (r: Draw) => {
  const [beta1, beta2] = [Math.fround(0.9), Math.fround(0.999)];
  const hyper = [3e-3, beta1, beta2, 1e-8, 0.1, 1 - beta1 ** step, 1 - beta2 ** step, 0];
  const started = step > 1 ? 1 : 0;
  const [m, v] = [r.normal(shape, 0.1 * started), r.uniform(shape, 0, 0.01 * started)];
  return [r.normal(shape), r.normal(shape, 0.1), m, v, r.of([8], hyper), r.of([1], [scale]), decay];
};

/** A call with tensors of these shapes. */
const shaped = (r: Draw, param: number[], grad: number[], hyper: number[]) => [
  r.normal(param), r.normal(grad), r.normal(param), r.normal(param), r.normal(hyper), r.normal([1]), true,
];

export default opSamples({
  op: adamw, reference: ref.adamw,
  samples: [
    { name: "no elements", args: args([0, 4], 1, true) },
    { name: "the first step", args: args([8, 12], 1, true) },
    { name: "a later step", args: args([5, 52], 100, true) },
    { name: "without decay", args: args([64], 3, false) },
    { name: "a clipped gradient", args: args([64], 3, true, 0.01) },
    { name: "an odd size", args: args([7, 11], 2, true) },
    { name: "one element", args: args([1], 2, true) },
    { name: "several workgroups and a rest", args: args([3, 1372], 2, true) },
    { name: "several workgroups of an odd size", args: args([1031], 2, true) },
    {
      name: "a gradient of zero",
      args: (r) => args([9], 1, true)(r).with(1, r.normal([9], 0)),
    },
  ],
  errors: [
    {
      name: "a gradient of another shape",
      args: (r) => shaped(r, [4], [2, 2], [8]),
      message: /adamw.*grad.*\[4\].*\[2, 2\]/,
    },
    {
      name: "too few hyper-parameters",
      args: (r) => shaped(r, [4], [4], [7]),
      message: /adamw.*hyper.*\[8\].*\[7\]/,
    },
  ],
});
