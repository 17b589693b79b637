import { watch_gradient } from "../../src/ops/watch_gradient.ts";
import * as ref from "../../src/reference/watch_gradient.ts";
import { opSamples } from "./suite.ts";

export default [
  opSamples({
    op: watch_gradient, reference: ref.watch_gradient, vjp: ref.watch_gradient_vjp,
    samples: [{ name: "a matrix", args: (r) => [r.normal([3, 5]), { sees() {} }] }],
  }),
];
