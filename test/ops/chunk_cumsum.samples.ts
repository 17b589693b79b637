import { chunk_cumsum } from "../../src/ops/chunk_cumsum.ts";
import { chunk_cumsum as reference, chunk_cumsum_vjp } from "../../src/reference/chunk_cumsum.ts";
import { type Draw, opSamples } from "./suite.ts";

function args(
  r: Draw, B: number, L: number, H: number, Q: number, limit = [0, Infinity], mean = -2,
): unknown[] {
  const bias = r.uniform([H], mean - 1, mean + 1);
  return [r.normal([B, L, H]), r.uniform([H], -1, 2), bias, Q, limit];
}

export default opSamples({
  op: chunk_cumsum,
  reference,
  vjp: chunk_cumsum_vjp,
  samples: [
    { name: "whole chunks", args: (r) => args(r, 2, 32, 8, 16) },
    { name: "partial chunk", args: (r) => args(r, 3, 21, 5, 8) },
    { name: "small steps", args: (r) => args(r, 2, 40, 4, 64, [0, Infinity], -12) },
    { name: "vanishing steps", args: (r) => args(r, 1, 8, 2, 4, [0, Infinity], -30) },
    { name: "large steps", args: (r) => args(r, 1, 16, 3, 16, [0, 1e30], 25) },
    { name: "clamped on both sides", args: (r) => args(r, 2, 30, 4, 7, [0.1, 0.2]) },
    { name: "clamped from above", args: (r) => args(r, 1, 12, 2, 6, [0, 0.15]) },
    { name: "one position", args: (r) => args(r, 2, 1, 3, 4) },
    { name: "chunks of one", args: (r) => args(r, 1, 5, 2, 1) },
    { name: "more chunks than one slice of the sums", args: (r) => args(r, 2, 150, 2, 2) },
    { name: "no rows", args: (r) => args(r, 0, 8, 4, 4) },
    { name: "no positions", args: (r) => args(r, 2, 0, 3, 4) },
  ],
  errors: [
    {
      name: "a bias per position", args: (r) => args(r, 1, 4, 2, 4).with(2, r.normal([4])),
      message: /chunk_cumsum: dt_bias must be \[2\], found \[4\]/,
    },
    {
      name: "chunks of nothing", args: (r) => args(r, 1, 4, 2, 0),
      message: /chunk_cumsum: chunk_size must be a whole number above 0, found 0/,
    },
  ],
});
