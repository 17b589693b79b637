import { linear } from "../../src/ops/linear.ts";
import * as ref from "../../src/reference/linear.ts";
import { opSamples, type Sample } from "./suite.ts";
import { rounded } from "./halves.ts";

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
    ...[[2, 9, 24, 20], [7, 5, 23, 19], [1, 1, 40, 18], [1, 2, 37, 17], [2, 2, 36, 21]].flatMap(
      ([b, l, K, N]): Sample[] => [
        {
          name: `relu2 ${b} x ${l}, ${K} -> ${N}`,
          args: (r) => [r.normal([b!, l!, K!]), r.normal([N!, K!]), r.normal([N!]), null,
            { activation: "relu2" }],
        },
        {
          name: `residual ${b} x ${l}, ${K} -> ${N}`,
          args: (r) => [r.normal([b!, l!, K!]), r.normal([N!, K!]), r.normal([N!]), r.normal([b!, l!, N!])],
        },
      ]),
    {
      name: "relu2 without a bias", args: (r) => [
        r.normal([17, 16]), r.normal([9, 16]), null, null, { activation: "relu2" }],
    },
    {
      name: "residual without a bias", reduction: 600,
      args: (r) => [r.normal([5, 600]), r.normal([8, 600]), null, r.normal([5, 8])],
    },
    ...(["f16", "bf16"] as const).flatMap((dtype): Sample[] => [
      {
        name: `weights in ${dtype}`,
        args: (r) => [r.normal([18, 24]), r.half(r.normal([20, 24]), dtype), r.half(r.normal([20]), dtype)],
      },
      { name: `odd weights in ${dtype}`, args: (r) => [
        r.normal([18, 23]), r.half(r.normal([19, 23]), dtype), null] },
      {
        name: `two rows, odd outputs, weights in ${dtype}`,
        args: (r) => [r.normal([2, 36]), r.half(r.normal([21, 36]), dtype), r.normal([21])],
      },
      { name: `one row, weights in ${dtype}`, args: (r) => [
        r.normal([1, 24]), r.half(r.normal([20, 24]), dtype), null] },
      {
        name: `all in ${dtype}`, ...rounded(dtype),
        args: (r) => [
          r.half(r.normal([18, 24]), dtype), r.half(r.normal([20, 24]), dtype), r.half(r.normal([20]), dtype),
          r.half(r.normal([18, 20]), dtype),
        ],
      },
      {
        name: `all in ${dtype}, odd, relu2`, ...rounded(dtype),
        args: (r) => [
          r.half(r.normal([17, 23]), dtype), r.half(r.normal([19, 23]), dtype), r.half(r.normal([19]), dtype),
            null,
          { activation: "relu2" },
        ],
      },
      {
        name: `relu2 into ${dtype}`, ...rounded(dtype),
        args: (r) => [r.normal([18, 24]), r.normal([20, 24]), null, null,
          { activation: "relu2", out: dtype }],
      },
      {
        name: `one row, relu2 into ${dtype}`, ...rounded(dtype),
        args: (r) => [r.normal([1, 24]), r.normal([21, 24]), r.normal([21]), null,
          { activation: "relu2", out: dtype }],
      },
    ]),
  ],
  errors: [
    {
      name: "a residual of the wrong shape", message: /linear.*residual.*\[2, 3\].*\[2, 4\]/,
      args: (r) => [r.normal([2, 4]), r.normal([3, 4]), null, r.normal([2, 4])],
    },
    {
      name: "a residual beside an activation", message: /linear.*residual.*activation/,
      args: (r) => [r.normal([2, 4]), r.normal([3, 4]), null, r.normal([2, 3]), { activation: "relu2" }],
    },
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
