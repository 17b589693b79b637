import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type CurveOptions, lossCurve, movingAverage, niceTicks } from "../../src/train/curve.ts";

/** A small XML reader: the names of all elements, or an error at the first tag that does not match. */
function elements(svg: string): string[] {
  const open: string[] = [];
  const all: string[] = [];
  const withoutStyle = svg.replace(/<style>[^<]*<\/style>/, "");
  const tag = /<(\/?)([a-z]+)((?:\s+[\w:-]+="[^"<>]*")*)\s*(\/?)>/gi;
  for (const [, close, name, body, single] of withoutStyle.matchAll(tag)) {
    if (close) expect(open.pop()).toBe(name);
    else if (!single) open.push(name!);
    if (!close) all.push(name!);
    expect(body).not.toMatch(/NaN|Infinity|undefined/);
  }
  expect(open).toEqual([]);
  expect(withoutStyle.replace(/<[^<>]*>/g, "")).not.toMatch(/[<>]|&(?!amp;|lt;|gt;)/);
  return all;
}

const run = (length: number) => Array.from({ length }, (_, i) => {
  return { step: i + 1, loss: 2 + 3 * Math.exp(-i / 40) + 0.1 * Math.sin(i) };
});
const labels = (svg: string) => [...svg.matchAll(/class="of-(\w+)"[^>]* y="([\d.]+)"[^>]*>([^<]*)</g)]
  .map(([, kind, y, text]) => ({ kind, y: Number(y), text }));

describe("lossCurve", () => {
  const options: CurveOptions = {
    train: run(300),
    validation: [{ step: 100, loss: 2.4 }, { step: 300, loss: 2.2 }],
    references: [{ label: "unigram", value: 3.3 }, { label: "bigram", value: 2.5 }],
  };

  test("draws everything that it is given", () => {
    const svg = lossCurve(options);
    const found = elements(svg);
    expect(found[0]).toBe("svg");
    expect(found.filter((name) => name === "circle")).toHaveLength(2);
    expect(svg.match(/class="reference"/g)).toHaveLength(2);
    const texts = labels(svg).map(({ text }) => text);
    expect(texts).toEqual(["unigram 3.30", "bigram 2.50", "validation 2.20", "train 2.00"]);
    expect(svg).toContain("prefers-color-scheme:dark");
  });

  test("asks for nothing from elsewhere and runs nothing", () => {
    const svg = lossCurve(options).replace('xmlns="http://www.w3.org/2000/svg"', "");
    expect(svg).not.toMatch(/https?:|url\(|@import|<script|href|\son\w+=/);
  });

  test("maps values to places: higher loss higher up, later steps to the right", () => {
    const svg = lossCurve({ train: [{ step: 0, loss: 4 }, { step: 50, loss: 2 }, { step: 100, loss: 1 }] });
    const path = /class="train"[^>]*d="M([^"]+)"/.exec(svg)![1]!.split(/[ L]/).map(Number);
    expect(path).toHaveLength(6);
    const [x0, y0, x1, y1, x2, y2] = path as [number, number, number, number, number, number];
    expect(x1 - x0).toBeCloseTo(x2 - x1, 0);
    expect((y1 - y0) / (y2 - y0)).toBeCloseTo(2 / 3, 2);
    expect(y0).toBeGreaterThan(40);
    expect(y2).toBeLessThan(480 - 40);
  });

  test("keeps labels apart and inside, however close their values are", () => {
    const values = fc.array(fc.double({ min: 1, max: 6, noNaN: true }), { minLength: 1, maxLength: 12 });
    fc.assert(fc.property(values, (list) => {
      const svg = lossCurve({ ...options, references: list.map((value, i) => ({ label: `r${i}`, value })) });
      const heights = labels(svg).map(({ y }) => y);
      expect(heights).toHaveLength(list.length + 2);
      for (const [i, y] of heights.entries()) {
        expect(y).toBeGreaterThan(60);
        expect(y).toBeLessThan(440);
        if (i > 0) expect(y - heights[i - 1]!).toBeGreaterThan(15.7);
      }
    }));
  });

  test("escapes texts", () => {
    const svg = lossCurve({ ...options, title: "<b> & \"c\"", references: [{ label: "a<b>&", value: 2 }] });
    elements(svg);
    expect(svg).toContain("&lt;b&gt; &amp; \"c\"");
    expect(labels(svg).some(({ text }) => text === "a&lt;b&gt;&amp; 2.00")).toBe(true);
  });

  test.each<[string, CurveOptions]>([
    ["no points", { train: [] }],
    ["one point", { train: [{ step: 1, loss: 3 }] }],
    ["a flat line of zeros", { train: [{ step: 1, loss: 0 }, { step: 2, loss: 0 }] }],
    ["values that are not finite", { train: [NaN, 3, Infinity].map((loss, step) => ({ step, loss })) }],
    ["validation alone", { train: [], validation: [{ step: 5, loss: 1 }] }],
    ["huge values", { train: [{ step: 1, loss: 1e30 }, { step: 2, loss: 1 }] }],
  ])("stays well formed with %s", (_, input) => {
    expect(elements(lossCurve(input)).filter((name) => name === "svg")).toHaveLength(1);
  });

  test("stays small for long runs and keeps their extremes", () => {
    const train = run(200_000).map((p, i) => (i === 150_000 ? { ...p, loss: 9 } : p));
    const svg = lossCurve({ train });
    expect(svg.length).toBeLessThan(100_000);
    const band = /class="band" d="M([^"]*)Z"/.exec(svg)![1]!.split("L");
    const heights = band.map((point) => Number(point.split(" ")[1]));
    expect(Math.min(...heights)).toBeLessThan(100); // the spike reaches the top
  });
});

test("niceTicks are round, even and inside", () => {
  expect(niceTicks(0, 10, 5)).toEqual([0, 2, 4, 6, 8, 10]);
  expect(niceTicks(1.3, 5.6, 7)).toEqual([2, 3, 4, 5]);
  expect(niceTicks(0.11, 0.32, 5)).toEqual([0.15, 0.2, 0.25, 0.3]);
  expect(niceTicks(-0.3, 0.7, 4)).toEqual([-0.25, 0, 0.25, 0.5]);
  const real = (min: number) => fc.double({ min, max: 1e6, noNaN: true });
  fc.assert(fc.property(real(-1e6), real(1e-3), fc.integer({ min: 2, max: 12 }), (from, span, count) => {
    const ticks = niceTicks(from, from + span, count);
    expect(ticks.length).toBeGreaterThanOrEqual(1);
    expect(ticks.length).toBeLessThanOrEqual(count + 1);
    for (const tick of ticks) {
      expect(tick).toBeGreaterThanOrEqual(from - span * 1e-6);
      expect(tick).toBeLessThanOrEqual(from + span * (1 + 1e-6));
    }
  }));
});

test("movingAverage starts short and ends with the full window", () => {
  const values = Array.from({ length: 64 }, (_, i) => i);
  const means = movingAverage(values, 4);
  expect(means.slice(0, 9)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 7.5]);
  expect(means.at(-1)).toBe(61.5);
  expect(movingAverage([5, 7], 1)).toEqual([5, 7]);
});
