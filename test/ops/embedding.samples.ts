import { embedding } from "../../src/ops/embedding.ts";
import * as ref from "../../src/reference/embedding.ts";
import { opSamples } from "./suite.ts";

export default opSamples({
  op: embedding, reference: ref.embedding, vjp: ref.embedding_vjp,
  samples: [
    { name: "whole vectors", args: (r) => [r.integers([3, 17], 0, 11), r.normal([11, 16])] },
    { name: "odd sizes", args: (r) => [r.integers([5, 7], 0, 13), r.normal([13, 9])] },
    {
      name: "one id again and again", reduction: 300,
      args: (r) => [r.integers([300], 4, 5), r.normal([6, 8])],
    },
    { name: "many tokens", args: (r) => [r.integers([2, 500], 0, 37), r.normal([37, 4])], reduction: 100 },
    { name: "a large table", args: (r) => [r.integers([40], 0, 5000), r.normal([5000, 4])] },
    {
      name: "ids outside the table",
      args: (r) => [r.of([6], [-1, 0, 5, 6, -100, 3], "i32"), r.normal([6, 12])],
    },
    {
      name: "a part of the table",
      args: (r) => [r.of([7], [-1, 9, 10, 15, 16, -100, 2147483647], "i32"), r.normal([6, 12]), 10],
    },
    { name: "one token", args: (r) => [r.integers([1, 1], 0, 4), r.normal([4, 12])] },
    { name: "a single id", args: (r) => [r.of([], [2], "i32"), r.normal([4, 12])] },
    { name: "no tokens", args: (r) => [r.integers([0], 0, 4), r.normal([4, 12])] },
  ],
  errors: [
    {
      name: "a weight that is no matrix", message: /embedding.*weight.*\[V, D\].*\[12\]/,
      args: (r) => [r.integers([2], 0, 3), r.normal([12])],
    },
  ],
});
