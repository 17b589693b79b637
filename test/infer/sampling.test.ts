import { describe, expect, test } from "vitest";
import { checkSampling, draw, GREEDY, uniformStream, verifyDrafts } from "../../src/infer/sampling.ts";

describe("verifyDrafts", () => {
  // Two positions over four tokens; drafts come from q, the result must be distributed as p says.
  const q = Float32Array.from([0.7, 0.1, 0.1, 0.1, 0.25, 0.25, 0.25, 0.25]);
  const p = Float32Array.from([0.2, 0.5, 0.3, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]);

  test("leaves the model's distribution unchanged", () => {
    const runs = 40_000;
    const drafting = uniformStream(1, 1);
    const verdict = uniformStream(1, 2);
    const first = [0, 0, 0, 0];
    const second = [0, 0, 0, 0];
    let reached = 0;
    for (let i = 0; i < runs; i++) {
      const drafts = [draw(q.subarray(0, 4), drafting()), draw(q.subarray(4, 8), drafting())];
      const { accepted, next } = verifyDrafts(drafts, q, p, 4, verdict);
      first[accepted > 0 ? drafts[0]! : next]!++;
      if (accepted === 0) continue;
      reached++;
      second[accepted > 1 ? drafts[1]! : next]!++;
    }
    const close = (counts: number[], total: number, expected: Float32Array) =>
      counts.forEach((count, token) => {
        const deviation = Math.sqrt(expected[token]! * (1 - expected[token]!) / total);
        expect(Math.abs(count / total - expected[token]!)).toBeLessThanOrEqual(5 * deviation);
      });
    close(first, runs, p.subarray(0, 4));
    close(second, reached, p.subarray(4, 8));
    expect(first[3]).toBe(0);
  });

  test("accepts all drafts that cannot be refused and adds one more", () => {
    const sure = Float32Array.from([0, 1, 0, 0, 1, 0, 0, 0]);
    const model = Float32Array.from([0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]);
    expect(verifyDrafts([1, 0], sure, model, 4, () => 0.999)).toEqual({ accepted: 2, next: 3 });
  });

  test("draws nothing of weight zero", () => {
    expect(draw(Float32Array.from([0, 2, 0, 1, 0]), 0)).toBe(1);
    expect(draw(Float32Array.from([0, 2, 0, 1, 0]), 0.9999999)).toBe(3);
    expect(draw(Float32Array.from([0, 2, 0, 1, 0]), 2 / 3 - 1e-9)).toBe(1);
  });
});

describe("checkSampling", () => {
  test.each([
    ["temperature", { temperature: -1 }], ["temperature", { temperature: NaN }], ["top_k", { top_k: 1.5 }],
    ["top_p", { top_p: 0 }], ["min_p", { min_p: 2 }], ["seed", { seed: -1 }],
  ])("refuses %s out of range", (name, change) => {
    expect(() => checkSampling({ ...GREEDY, ...change })).toThrow(name);
  });
});
