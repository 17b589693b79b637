import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { UsageError } from "../../src/tensor/errors.ts";
import { type ScheduleOptions, makeSchedule } from "../../src/train/schedule.ts";

const at = (options: ScheduleOptions, steps: readonly number[]) => steps.map(makeSchedule(options));

describe("schedules", () => {
  test("constant rises over the warm-up and stays", () => {
    expect(at({ kind: "constant", peak: 8, warmup: 4 }, [0, 1, 2, 3, 4, 1e6])).toEqual([2, 4, 6, 8, 8, 8]);
    expect(at({ kind: "constant", peak: 8 }, [0, 9])).toEqual([8, 8]);
  });

  test("WSD decays in a line to its minimum", () => {
    const options = { kind: "wsd", peak: 1, warmup: 2, steps: 10, decay: 4, min: 0.2 } as const;
    const expected = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2];
    const rates = at(options, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50]);
    rates.forEach((lr, i) => expect(lr).toBeCloseTo(expected[i]!, 14));
  });

  test("WSD decays with 1 - sqrt, fast first", () => {
    const schedule = makeSchedule({ kind: "wsd", peak: 2, steps: 100, decay: 100, shape: "sqrt" });
    expect(schedule(0)).toBe(2);
    expect(schedule(25)).toBeCloseTo(1, 14);
    expect(schedule(81)).toBeCloseTo(0.2, 14);
    expect(schedule(100)).toBe(0);
  });

  test("cosine is half way down in the middle", () => {
    const schedule = makeSchedule({ kind: "cosine", peak: 1, warmup: 10, steps: 110, min: 0.1 });
    expect(schedule(0)).toBeCloseTo(0.1, 14);
    expect(schedule(9)).toBe(1);
    expect(schedule(10)).toBe(1);
    expect(schedule(35)).toBeCloseTo(0.1 + 0.9 * (1 + Math.SQRT1_2) / 2, 14);
    expect(schedule(60)).toBeCloseTo(0.55, 14);
    expect(schedule(110)).toBe(0.1);
    expect(schedule(111)).toBe(0.1);
  });

  test("rise to the peak, never leave the range, and never rise again", () => {
    const sizes = fc.record({
      warmup: fc.nat(20), stable: fc.integer({ min: 1, max: 20 }), decay: fc.nat(20),
      share: fc.double({ min: 0, max: 1, noNaN: true }),
      kind: fc.constantFrom("linear", "sqrt", "cosine"),
    });
    fc.assert(fc.property(sizes, ({ warmup, stable, decay, share, kind }) => {
      const peak = 3e-4;
      const steps = warmup + stable + decay;
      const common = { peak, warmup, steps, min: share * peak };
      const schedule = makeSchedule(kind === "cosine"
        ? { kind, ...common }
        : { kind: "wsd", ...common, decay, shape: kind === "sqrt" ? "sqrt" : "linear" });
      const rates = Array.from({ length: steps + 3 }, (_, step) => schedule(step));
      expect(Math.max(...rates)).toBe(peak);
      expect(rates.at(-1)).toBe(share * peak);
      for (let step = 1; step < rates.length; step++) {
        if (step < warmup) expect(rates[step]).toBeGreaterThan(rates[step - 1]!);
        else expect(rates[step]).toBeLessThanOrEqual(rates[step - 1]! * (1 + 1e-12));
        expect(rates[step]).toBeGreaterThan(step < warmup ? 0 : share * peak * (1 - 1e-12) - 1e-30);
      }
    }));
  });

  const wrong: [string, ScheduleOptions, RegExp][] = [
    ["a peak of zero", { kind: "constant", peak: 0 }, /peak .* found 0/],
    ["a peak that is not a number", { kind: "cosine", peak: NaN, steps: 5 }, /found NaN/],
    ["a minimum above the peak", { kind: "cosine", peak: 1, steps: 5, min: 2 }, /0 and the peak 1, found 2/],
    ["a broken number of steps", { kind: "wsd", peak: 1, steps: 2.5, decay: 1 }, /steps .* found 2.5/],
    ["a negative warm-up", { kind: "constant", peak: 1, warmup: -1 }, /warmup .* >= 0, found -1/],
    ["long phases", { kind: "wsd", peak: 1, warmup: 6, steps: 10, decay: 5 }, /\(6\) .* \(5\) .* 10 steps/],
    ["a long warm-up", { kind: "cosine", peak: 1, warmup: 11, steps: 10 }, /\(11\) .* 10 steps/],
  ];
  test.each(wrong)("refuse %s", (_, options, message) => {
    expect(() => makeSchedule(options)).toThrow(UsageError);
    expect(() => makeSchedule(options)).toThrow(message);
  });
});
