/** One line of a bench result: what was measured, where, and with which versions. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import type { AdapterInfo } from "../../gpu/adapters.ts";
import { median } from "../../gpu/measure.ts";
import { packagePath } from "../package.ts";

/** What can hold a case back: reading and writing memory, or multiplying. */
export type Bound = "copy" | "matmul";

/** Where and with what all lines of a run were measured. */
export interface Stamp {
  readonly adapter: string;
  readonly adapter_name: string;
  /** The driver's own words. */
  readonly driver: string;
  readonly krait: string;
  readonly node: string;
  /** Version of the webgpu package; null where it is not installed. */
  readonly webgpu: string | null;
  /** Commit of the clone, with "+" when files differ from it; null outside of a clone. */
  readonly commit: string | null;
  readonly date: string;
}

/** What a suite says about a case. */
export interface Measured {
  readonly suite: string;
  readonly case: string;
  /** Milliseconds of single runs, the smallest first; empty for what is no time. */
  readonly times: readonly number[];
  /** The figure to look at, and its unit. */
  readonly unit: "GFLOP/s" | "GB/s" | "tokens/s" | "us" | "ms" | "bytes" | "mismatches";
  /** Floating-point operations, bytes or tokens of one run, by `unit`; the figure itself without times. */
  readonly work: number;
  /** Operations or bytes of one run, as far as `bound` decides. */
  readonly bound?: { readonly by: Bound; readonly work: number };
  /** Further numbers of the line. */
  readonly details?: Readonly<Record<string, number | string | null>>;
  /** A few words for people, at the end of the table's row. */
  readonly remark?: string;
  /** Too small a part of a whole for the table. */
  readonly minor?: boolean;
}

export interface BenchLine {
  readonly suite: string;
  readonly case: string;
  /** Median milliseconds, the fastest and the slowest run; null for what is no time. */
  readonly ms: number | null;
  readonly min_ms: number | null;
  readonly max_ms: number | null;
  readonly runs: number;
  readonly rate: number;
  readonly unit: Measured["unit"];
  readonly bound: Bound | null;
  /** In GB/s for "copy", in GFLOP/s for "matmul": what the case reached, and what the adapter gives. */
  readonly achieved: number | null;
  readonly ceiling: number | null;
  /** achieved / ceiling */
  readonly share: number | null;
  readonly [detail: string]: number | string | null;
}

/** Counts stay whole; what is measured has no more than four digits that mean something. */
const figure = (x: number) => (Number.isInteger(x) ? x : Number(x.toPrecision(4)));

/** The line of a measurement. @param ceiling the adapter's rate in the unit of the bound; null without one */
export function benchLine(measured: Measured, ceiling: number | null): BenchLine {
  const { suite, times, unit, work, bound, details } = measured;
  const ms = times.length > 0 ? median(times) : null;
  const achieved = bound && ms !== null && ms > 0 ? bound.work / ms / 1e6 : null;
  return {
    suite, case: measured.case,
    ms: ms === null ? null : figure(ms),
    min_ms: ms === null ? null : figure(times[0]!), max_ms: ms === null ? null : figure(times.at(-1)!),
    runs: times.length, rate: figure(rateOf(unit, work, ms)), unit,
    bound: bound?.by ?? null, achieved: achieved === null ? null : figure(achieved),
    ceiling: bound && ceiling !== null ? figure(ceiling) : null,
    share: achieved === null || ceiling === null ? null : figure(achieved / ceiling),
    ...Object.fromEntries(Object.entries(details ?? {}).map(([key, value]) =>
      [key, typeof value === "number" ? figure(value) : value])),
  };
}

function rateOf(unit: Measured["unit"], work: number, ms: number | null): number {
  if (ms === null) return work;
  switch (unit) {
    case "GFLOP/s": case "GB/s": return work / ms / 1e6;
    case "tokens/s": return (1000 * work) / ms;
    case "us": return (1000 * ms) / work;
    case "ms": return ms;
    case "bytes": case "mismatches": return work;
  }
}

/** Versions and names for the lines of a run on this adapter. */
export function makeStamp(info: AdapterInfo): Stamp {
  const { version } = JSON.parse(readFileSync(packagePath("package.json"), "utf8")) as { version: string };
  return {
    adapter: info.id, adapter_name: info.name, driver: info.description, krait: version,
    node: process.version, webgpu: webgpuVersion(), commit: commitOf(packagePath()),
    date: new Date().toISOString(),
  };
}

function webgpuVersion(): string | null {
  let folder: string;
  try {
    folder = dirname(createRequire(import.meta.url).resolve("webgpu"));
  } catch {
    return null;
  }
  while (!existsSync(join(folder, "package.json"))) folder = dirname(folder);
  return (JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as { version: string }).version;
}

/** A folder that has no .git of its own lies in somebody else's clone, whose commit says nothing. */
function commitOf(folder: string): string | null {
  if (!existsSync(join(folder, ".git"))) return null;
  const git = (...args: string[]) => spawnSync("git", args, { cwd: folder, encoding: "utf8" });
  const { status, stdout } = git("rev-parse", "--short=12", "HEAD");
  if (status !== 0) return null;
  const changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "shaders");
  return `${stdout.trim()}${changed.stdout.trim() === "" ? "" : "+"}`;
}
