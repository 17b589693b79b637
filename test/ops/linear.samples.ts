import { linear } from "../../src/ops/linear.ts";
import * as ref from "../../src/reference/linear.ts";
import { opSamples } from "./suite.ts";

export default opSamples({
  op: linear, reference: ref.linear, vjp: ref.linear_vjp,
  samples: [
    { name: "whole vectors", args: (r) => [r.normal([2, 9, 24]), r.normal([20, 24]), r.normal([20])] },
    { name: "odd sizes", args: (r) => [r.normal([3, 7, 23]), r.normal([19, 23]), r.normal([19])] },
    { name: "no bias", args: (r) => [r.normal([35, 16]), r.normal([33, 16]), null] },
    {
      name: "odd outputs", reduction: 65,
      args: (r) => [r.normal([18, 32]), r.normal([65, 32]), r.normal([65])],
    },
    {
      name: "many rows", reduction: 300,
      args: (r) => [r.normal([300, 8]), r.normal([12, 8]), r.normal([12])],
    },
    { name: "one row", args: (r) => [r.normal([1, 40]), r.normal([18, 40]), r.normal([18])] },
    { name: "one row, odd", args: (r) => [r.normal([1, 1, 37]), r.normal([17, 37]), null] },
    { name: "two rows", args: (r) => [r.normal([2, 37]), r.normal([17, 37]), r.normal([17])] },
    { name: "four rows", args: (r) => [r.normal([4, 1, 36]), r.normal([21, 36]), r.normal([21])] },
    { name: "a vector", args: (r) => [r.normal([12]), r.normal([5, 12]), r.normal([5])] },
    { name: "one by one", args: (r) => [r.normal([1, 1]), r.normal([1, 1]), r.normal([1])] },
    { name: "no rows", args: (r) => [r.normal([0, 12]), r.normal([8, 12]), r.normal([8])] },
    { name: "no inputs", args: (r) => [r.normal([5, 0]), r.normal([8, 0]), r.normal([8])] },
  ],
  errors: [
    {
      name: "weight of the wrong width", message: /linear.*weight.*\[N, 4\].*\[3, 5\]/,
      args: (r) => [r.normal([2, 4]), r.normal([3, 5]), null],
    },
    {
      name: "bias of the wrong width", message: /linear.*bias.*\[3\].*\[4\]/,
      args: (r) => [r.normal([2, 4]), r.normal([3, 4]), r.normal([4])],
    },
  ],
});
