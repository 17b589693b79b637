import { argmax, probabilities, sample } from "../../src/ops/sample.ts";
import * as ref from "../../src/reference/sample.ts";
import { type Draw, opSamples } from "./suite.ts";

interface Settings { temperature?: number; top_k?: number; top_p?: number; min_p?: number }
const settings = (r: Draw, { temperature = 1, top_k = 0, top_p = 1, min_p = 0 }: Settings = {}) =>
  r.of([4], [temperature, top_k, top_p, min_p]);
const counter = (r: Draw, step = 7) => r.of([4], [12345, 678, step, 3], "u32");

const equal = (r: Draw, V: number) => r.of([2, V], new Array<number>(2 * V).fill(0.5));
const stairs = (r: Draw) => r.of([1, 9], [1, 3, 2, 3, 0, 2, 3, 1, -0]);

/** Every filter alone and together; the names say what is special. */
const cases: { name: string; logits: (r: Draw) => unknown; settings?: Settings; reduction?: number }[] = [
  { name: "no rows", logits: (r) => r.normal([0, 5]) },
  { name: "one token", logits: (r) => r.normal([3, 1]), settings: { top_p: 0.5, top_k: 1 } },
  { name: "no filter", logits: (r) => r.normal([7, 11], 2) },
  { name: "odd vocabulary over several stretches", logits: (r) => r.normal([3, 4999], 2), reduction: 4999 },
  { name: "greedy", logits: (r) => r.normal([5, 300]), settings: { temperature: 0, top_k: 3, min_p: 0.5 } },
  { name: "greedy on ties", logits: stairs, settings: { temperature: 0 } },
  { name: "cold", logits: (r) => r.normal([5, 300]), settings: { temperature: 0.125 } },
  { name: "hot", logits: (r) => r.normal([5, 300], 30), settings: { temperature: 50 } },
  { name: "top-k", logits: (r) => r.normal([5, 300]), settings: { top_k: 17 } },
  { name: "top-1", logits: (r) => r.normal([5, 300]), settings: { top_k: 1 } },
  { name: "top-k of more than there are", logits: (r) => r.normal([2, 9]), settings: { top_k: 50 } },
  { name: "top-k through a tie", logits: stairs, settings: { top_k: 2 } },
  { name: "top-k through a lower tie", logits: stairs, settings: { top_k: 4 } },
  { name: "top-k of equal logits", logits: (r) => equal(r, 200), settings: { top_k: 129 } },
  { name: "top-p", logits: (r) => r.normal([5, 300], 2), settings: { top_p: 0.75 } },
  { name: "top-p close to nothing", logits: (r) => r.normal([5, 300], 2), settings: { top_p: 1e-6 } },
  { name: "top-p of zero", logits: (r) => r.normal([5, 30], 2), settings: { top_p: 0 } },
  { name: "top-p of equal logits", logits: (r) => equal(r, 64), settings: { top_p: 0.5 } },
  { name: "top-p through a tie", logits: (r) => r.of([1, 5], [0, 4, 4, 4, 4]), settings: { top_p: 0.6 } },
  { name: "min-p", logits: (r) => r.normal([5, 300], 2), settings: { min_p: 0.07 } },
  { name: "min-p of one keeps all the largest", logits: stairs, settings: { min_p: 1 } },
  {
    name: "all together",
    logits: (r) => r.normal([9, 300], 3), settings: { temperature: 0.75, top_k: 40, top_p: 0.9, min_p: 0.03 },
  },
  {
    name: "top-p of what top-k left",
    logits: (r) => r.normal([9, 64], 0.1), settings: { top_k: 20, top_p: 0.53 },
  },
  {
    name: "masked tokens", logits: (r) => r.of([1, 6], [-Infinity, 1, -1e30, 2, -Infinity, 1.5]),
    settings: { temperature: 0.5, top_k: 5, top_p: 0.99 },
  },
  {
    name: "a large vocabulary",
    logits: (r) => r.normal([1, 131072], 3), settings: { top_k: 1000, top_p: 0.9 }, reduction: 2048,
  },
];

export default [
  opSamples({
    op: argmax, reference: ref.argmax,
    samples: [
      { name: "no rows", args: (r) => [r.normal([0, 5])] },
      { name: "one token", args: (r) => [r.normal([3, 1])] },
      { name: "odd sizes", args: (r) => [r.normal([67, 131])] },
      { name: "ties", args: (r) => [r.of([3, 5], [0, 2, 1, 2, 2, -0, 0, -1, 0, -0, -3, -3, -3, -3, -3])] },
      { name: "ties far apart", args: (r) => [r.of([5, 777], [...r.integers([5, 777], 0, 6).data])] },
      { name: "a large vocabulary", args: (r) => [r.normal([1, 131072])] },
    ],
    errors: [
      {
        name: "an empty vocabulary",
        args: (r) => [r.normal([2, 0])], message: /argmax.*logits.*V of at least 1.*\[2, 0\]/,
      },
    ],
  }),
  opSamples({
    op: probabilities, reference: ref.probabilities,
    samples: cases.map(({ name, logits, settings: values, reduction }) => ({
      name, args: (r: Draw) => [logits(r), settings(r, values)], reduction: reduction ?? 300,
    })),
    errors: [
      {
        name: "too few settings",
        args: (r) => [r.normal([2, 4]), r.normal([3])], message: /probabilities.*settings.*\[4\].*\[3\]/,
      },
    ],
  }),
  opSamples({
    op: sample, reference: ref.sample,
    samples: cases.flatMap(({ name, logits, settings: values }) => [0, 1].map((step) => ({
      name: `${name}, step ${step}`, args: (r: Draw) => [logits(r), settings(r, values), counter(r, step)],
    }))),
    errors: [
      {
        name: "a counter of the wrong size",
        args: (r) => [r.normal([2, 4]), settings(r), r.integers([3], 0, 9, "u32")],
        message: /sample.*counter.*\[4\].*\[3\]/,
      },
    ],
  }),
];
