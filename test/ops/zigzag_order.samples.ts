import { zigzag_order } from "../../src/ops/zigzag_order.ts";
import * as ref from "../../src/reference/zigzag_order.ts";
import { opSamples } from "./suite.ts";

export default opSamples({
  op: zigzag_order, reference: ref.zigzag_order, vjp: ref.zigzag_order_vjp,
  samples: [
    { name: "one rank", args: (r) => [r.normal([2, 4, 3]), 1, "sequence"] },
    { name: "two ranks, whole vec4s", args: (r) => [r.normal([2, 8, 6]), 2, "sequence"] },
    { name: "three ranks, odd widths", args: (r) => [r.normal([3, 6, 5]), 3, "sequence"] },
    { name: "four ranks, the other way", args: (r) => [r.normal([1, 16, 2, 3]), 4, "ranks"] },
    { name: "numbers of documents", args: (r) => [r.integers([2, 12], -5, 9), 2, "sequence"] },
    { name: "no rows", args: (r) => [r.normal([0, 8, 2]), 2, "ranks"] },
  ],
  errors: [{
    name: "a length that does not divide", args: (r) => [r.normal([1, 6, 2]), 2, "sequence"],
    message: /zigzag_order: L must be a multiple of 4, found 6/,
  }],
});
