import { random_logits, router_jitter } from "../../src/ops/router_noise.ts";
import * as ref from "../../src/reference/router_noise.ts";
import { type Draw, opSamples } from "./suite.ts";

const counter = (r: Draw) => r.of([4], [123456789, 7, 42, 0], "u32");

export default [
  opSamples({
    op: router_jitter, reference: ref.router_jitter, vjp: ref.router_jitter_vjp,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 8]), counter(r), { stream: 1, amount: 0.1 }] },
      { name: "no features", args: (r) => [r.normal([3, 0]), counter(r), { stream: 1, amount: 0.1 }] },
      { name: "one token", args: (r) => [r.normal([1, 5]), counter(r), { stream: 1, amount: 0.5 }] },
      { name: "odd sizes", args: (r) => [r.normal([37, 13]), counter(r), { stream: 3e9, amount: 0.01 }] },
      { name: "nothing", args: (r) => [r.normal([3, 4]), counter(r), { stream: 1, amount: 0 }] },
      {
        name: "tokens of a larger batch", args: (r) => [
          r.normal([3, 8]), counter(r), { stream: 5, amount: 0.1 }, r.of([3], [70, 2, 4e9], "u32"),
        ],
      },
    ],
    errors: [
      {
        name: "rank 3", args: (r) => [r.normal([1, 2, 4]), counter(r), { stream: 1, amount: 0.1 }],
        message: /router_jitter.*x.*\[T, D\].*\[1, 2, 4\]/,
      },
      {
        name: "a counter of the wrong size",
        args: (r) => [r.normal([2, 4]), r.of([3], [1, 2, 3], "u32"), { stream: 1, amount: 0.1 }],
        message: /router_jitter.*counter.*\[4\].*\[3\]/,
      },
      {
        name: "numbers of other tokens", args: (r) => [
          r.normal([2, 4]), counter(r), { stream: 1, amount: 0.1 }, r.of([3], [1, 2, 3], "u32"),
        ],
        message: /router_jitter.*rows.*\[2\].*\[3\]/,
      },
      {
        name: "factors below zero", args: (r) => [r.normal([2, 4]), counter(r), { stream: 1, amount: 1.5 }],
        message: /router_jitter.*amount.*from 0 to below 1.*1.5/,
      },
    ],
  }),
  opSamples({
    op: random_logits, reference: ref.random_logits, vjp: ref.random_logits_vjp, straightThrough: true,
    samples: [
      { name: "no tokens", args: (r) => [r.normal([0, 8]), counter(r), { stream: 1 }] },
      { name: "one token", args: (r) => [r.normal([1, 5]), counter(r), { stream: 1 }] },
      { name: "odd sizes", args: (r) => [r.normal([37, 13]), counter(r), { stream: 2 }] },
      {
        name: "tokens of a larger batch",
        args: (r) => [r.normal([3, 8]), counter(r), { stream: 5 }, r.of([3], [70, 2, 4e9], "u32")],
      },
    ],
    errors: [{
      name: "rank 3", args: (r) => [r.normal([1, 2, 4]), counter(r), { stream: 1 }],
      message: /random_logits.*x.*\[T, D\].*\[1, 2, 4\]/,
    }],
  }),
];
