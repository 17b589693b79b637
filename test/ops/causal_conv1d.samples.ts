import { causal_conv1d, causal_conv1d_update } from "../../src/ops/causal_conv1d.ts";
import * as ref from "../../src/reference/causal_conv1d.ts";
import type { NdArray } from "../../src/tensor/ndarray.ts";
import { documents } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

/** Arguments without history and documents. */
function plain(r: Draw, B: number, L: number, C: number, K: number): unknown[] {
  return [r.normal([B, L, C]), r.normal([C, K], 0.5), r.normal([C], 0.3), null, null];
}

/** Arguments with a history, and with documents of about `length` positions. */
function continued(r: Draw, B: number, L: number, C: number, K: number, length?: number): unknown[] {
  const seq_idx = length === undefined ? null : documents(r, { B, L }, length);
  return [...plain(r, B, L, C, K).slice(0, 3), r.normal([B, C, K]), seq_idx];
}

/** Arguments of a decode step. */
function step(r: Draw, B: number, C: number, K: number): unknown[] {
  return [r.normal([B, C, K]), r.normal([B, C]), r.normal([C, K]), r.normal([C])];
}

const forward = opSamples({
  op: causal_conv1d,
  reference: ref.causal_conv1d,
  vjp: ref.causal_conv1d_vjp,
  samples: [
    { name: "several spans", args: (r) => plain(r, 2, 70, 12, 4) },
    { name: "odd channels", args: (r) => plain(r, 2, 19, 7, 4) },
    { name: "three taps, no bias", args: (r) => [r.normal([1, 33, 8]), r.normal([8, 3]), null, null, null] },
    { name: "one tap", args: (r) => plain(r, 1, 5, 6, 1) },
    { name: "history", args: (r) => continued(r, 2, 21, 9, 4) },
    { name: "two taps with history", args: (r) => continued(r, 1, 4, 4, 2) },
    { name: "row shorter than the window", args: (r) => continued(r, 2, 2, 5, 4) },
    { name: "one position", args: (r) => plain(r, 3, 1, 4, 4) },
    { name: "documents and history", args: (r) => continued(r, 3, 67, 8, 4, 5) },
    { name: "documents of one or two positions", args: (r) => continued(r, 2, 37, 5, 4, 1.5) },
    {
      name: "a document that starts at the last position",
      args: (r) => continued(r, 1, 4, 4, 4).with(4, r.of([1, 4], [7, 7, 7, 1], "i32")),
    },
    { name: "no state wanted", args: (r) => [...plain(r, 1, 9, 8, 4), false] },
    { name: "no rows", args: (r) => plain(r, 0, 8, 4, 4) },
    { name: "no positions", args: (r) => continued(r, 2, 0, 4, 4) },
  ],
  errors: [
    {
      name: "five taps", args: (r) => plain(r, 1, 8, 4, 5),
      message: /causal_conv1d: weight must be \[4, K\] with K from 1 to 4, found \[4, 5\]/,
    },
    {
      name: "history of another width", args: (r) => continued(r, 1, 8, 4, 4).with(3, r.normal([1, 4, 3])),
      message: /initial_state must be \[1, 4, 4\], found \[1, 4, 3\]/,
    },
  ],
});

const update = opSamples({
  op: causal_conv1d_update,
  reference: (state: NdArray, xBC: NdArray, weight: NdArray, bias: NdArray | null) =>
    [ref.causal_conv1d_update(state, xBC, weight, bias), state],
  samples: [
    { name: "four taps", args: (r) => step(r, 3, 10, 4) },
    { name: "no bias", args: (r) => step(r, 1, 7, 3).with(3, null) },
    { name: "one tap", args: (r) => step(r, 2, 3, 1) },
    { name: "many channels", args: (r) => step(r, 2, 130, 4) },
    { name: "no rows", args: (r) => step(r, 0, 4, 4) },
  ],
  errors: [
    {
      name: "a state of another width", args: (r) => step(r, 1, 4, 4).with(0, r.normal([1, 4, 3])),
      message: /causal_conv1d_update: weight must be \[4, 3\], found \[4, 4\]/,
    },
  ],
});

export default [forward, update];
