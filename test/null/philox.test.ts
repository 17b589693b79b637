import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import {
  fillNormal, fillUniform, philox4x32, randomBits, randomNormal, randomUniform, seedWords,
} from "../../src/tensor/philox.ts";
import type { PhiloxBlock, RandomKey } from "../../src/tensor/philox.ts";

const key: RandomKey = { seed: 2024, stream: 3, step: 17 };
const words = (text: string[]): number[] => text.map((word) => Number.parseInt(word, 16));

describe("philox4x32-10", () => {
  const file = new URL("../fixtures/philox4x32_10.txt", import.meta.url);
  const lines = readFileSync(file, "utf8").trim().split("\n");

  test("has known answers to compare with", () => expect(lines.length).toBe(3));

  test.each(lines)("%s", (line) => {
    const numbers = words(line.trim().split(/\s+/).slice(2));
    expect(numbers).toHaveLength(10);
    const counter = numbers.slice(0, 4) as PhiloxBlock;
    expect(philox4x32(counter, [numbers[4]!, numbers[5]!])).toEqual(numbers.slice(6));
  });
});

describe("elements", () => {
  test("element e is word e % 4 of block e / 4", () => {
    const block = philox4x32([2, 0, 17, 3], [2024, 0]);
    expect([8, 9, 10, 11].map((e) => randomBits(key, e))).toEqual(block);
  });

  test("filling gives the elements one by one, from any block on", () => {
    const uniform = fillUniform(key, new Float64Array(11), 8);
    const normal = fillNormal(key, new Float64Array(11), 8);
    for (let i = 0; i < 11; i++) {
      expect(uniform[i]).toBe(randomUniform(key, 8 + i));
      expect(normal[i]).toBe(randomNormal(key, 8 + i));
    }
  });

  test("elements beyond 2^34 use the second counter word", () => {
    expect(randomBits(key, 2 ** 34 + 1)).toBe(philox4x32([0, 1, 17, 3], [2024, 0])[1]);
  });

  test("seed, stream and step all matter", () => {
    const variants = [
      key, { ...key, seed: 2025 }, { ...key, seed: 2024 + 2 ** 32 }, { ...key, stream: 4 },
      { ...key, step: 18 },
    ];
    expect(new Set(variants.map((variant) => randomBits(variant, 0))).size).toBe(variants.length);
  });
});

describe("distributions", () => {
  const n = 40_000;

  test("uniforms have 24 bits and fill [0, 1) evenly", () => {
    const draws = fillUniform(key, new Float32Array(n));
    const counts = new Array<number>(20).fill(0);
    for (const u of draws) {
      expect(u >= 0 && u < 1 && Number.isInteger(u * 2 ** 24)).toBe(true);
      counts[Math.floor(u * 20)]!++;
    }
    const chiSquare = counts.reduce((sum, count) => sum + (count - n / 20) ** 2 / (n / 20), 0);
    expect(chiSquare).toBeLessThan(43.8); // 19 degrees of freedom, one in a thousand
  });

  test("normals have the moments and tails of a standard normal", () => {
    const draws = fillNormal(key, new Float64Array(n));
    const mean = (f: (z: number) => number) => draws.reduce((sum, z) => sum + f(z), 0) / n;
    expect(Math.abs(mean((z) => z))).toBeLessThan(4 / Math.sqrt(n));
    expect(Math.abs(mean((z) => z ** 2) - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
    expect(Math.abs(mean((z) => z ** 4) - 3)).toBeLessThan(4 * Math.sqrt(96 / n));
    const inside = draws.filter((z) => Math.abs(z) < 1.959964).length / n;
    expect(Math.abs(inside - 0.95)).toBeLessThan(4 * Math.sqrt((0.95 * 0.05) / n));
    const neighbours = draws.reduce((sum, z, i) => sum + (i % 2 === 1 ? z * draws[i - 1]! : 0), 0) / (n / 2);
    expect(Math.abs(neighbours)).toBeLessThan(4 / Math.sqrt(n / 2));
  });
});

describe("seedWords", () => {
  test("splits numbers and bigints alike", () => {
    expect(seedWords(5 * 2 ** 32 + 7)).toEqual([7, 5]);
    expect(seedWords(0xfedcba9876543210n)).toEqual([0x76543210, 0xfedcba98]);
  });

  test.each([-1, 1.5, 2 ** 53, Number.NaN, -1n, 1n << 64n])("refuses %s", (seed) => {
    expect(() => seedWords(seed)).toThrow(/seed.*2\^53.*found/);
  });

  test("fill refuses a start inside a block", () => {
    expect(() => fillUniform(key, new Float32Array(1), 2)).toThrow(/multiple of 4.*found 2/);
  });
});
