import { existsSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import packageJson from "../../package.json" with { type: "json" };
import { parseFolder, parseSource, ROOT } from "../support/imports.ts";
import type { ImportEdge, SourceFile } from "../support/imports.ts";

/** A room imports from itself and from the rooms to its left. */
const ROOMS = [
  "gpu", "kernel", "tensor", "io", "text", "ops", "reference", "autograd", "precision", "nn", "models",
  "parallel", "train", "align", "compress", "infer",
];
const DOORS = ["server", "cli", "worker"]; // these may import from anything, and nothing but a door from them
const ALIASES = packageJson.imports as Record<string, { node: string; default: string }>;

const sources = parseFolder("src");

/** What is wrong with an import, as one sentence; null when nothing is. */
function offence(edge: ImportEdge): string | null {
  const says = (why: string) => `${edge.from} imports ${edge.to}: ${why}`;
  if (edge.to === "webgpu" && edge.from !== "src/gpu/provider.node.ts") {
    return says("only src/gpu/provider.node.ts may import the package webgpu");
  }
  const from = roomOf(edge.from);
  const target = ALIASES[edge.to]?.default.replace("./", "") ?? edge.to;
  if (target === "krait" || target.startsWith("krait/")) return says("sources name each other by path");
  if (!target.startsWith("src/")) {
    const outside = /^[a-z]+\/.*\.ts$/.test(target);
    return outside ? says("sources import only from src and from packages") : null;
  }
  const to = roomOf(target);
  if (from === null) return null; // src/index.ts
  if (to === null) return says("only users of the package import its index");
  for (const room of [from, to]) {
    if (![...ROOMS, ...DOORS].includes(room)) return says(`src/${room} is no room of the layer rule`);
  }
  if (from === to || DOORS.includes(from)) return null;
  if (from === "reference") return to === "tensor" ? null : says("reference imports from tensor alone");
  if (to === "reference") return says("the engine never computes with its own reference");
  if (ROOMS.includes(to) && ROOMS.indexOf(to) < ROOMS.indexOf(from)) return null;
  return says(`${to} comes after ${from}`);
}

function roomOf(path: string): string | null {
  const parts = path.split("/");
  return parts.length > 2 ? parts[1] ?? null : null;
}

/** The files of one cycle in which each loads the next before it can run, or null. */
function findCycle(files: readonly SourceFile[]): string[] | null {
  const byPath = new Map(files.map((file) => [file.path, file]));
  const done = new Set<string>();
  const walk = (path: string, trail: string[]): string[] | null => {
    if (trail.includes(path)) return [...trail.slice(trail.indexOf(path)), path];
    if (done.has(path)) return null;
    for (const edge of byPath.get(path)?.imports ?? []) {
      const cycle = edge.load !== "static" ? null : walk(edge.to, [...trail, path]);
      if (cycle) return cycle;
    }
    done.add(path);
    return null;
  };
  for (const { path } of files) {
    const cycle = walk(path, []);
    if (cycle) return cycle;
  }
  return null;
}

test("every source imports only from the rooms before its own", () => {
  expect(sources.length).toBeGreaterThan(20);
  expect(sources.flatMap((file) => file.imports.map(offence)).filter((each) => each !== null)).toEqual([]);
});

test("sources import each other without cycles", () => {
  expect(findCycle(sources)?.join(" -> ") ?? null).toBeNull();
});

test("only the web provider touches navigator", () => {
  const users = sources.filter((file) => file.names.has("navigator")).map((file) => file.path);
  expect(users).toEqual(["src/gpu/provider.web.ts"]);
});

test("nothing that a page loads imports a Node module", () => {
  const byPath = new Map(sources.map((file) => [file.path, file]));
  const entries = ["src/index.ts", "src/worker/worker.ts", "src/reference/index.ts"];
  const reached = new Set(entries.filter((path) => byPath.has(path)));
  const offences: string[] = [];
  for (const path of reached) {
    for (const edge of byPath.get(path)?.imports ?? []) {
      if (edge.load === "never") continue;
      if (edge.to.startsWith("node:")) offences.push(`${path} imports ${edge.to}`);
      const target = ALIASES[edge.to]?.default.replace("./", "") ?? edge.to;
      if (byPath.has(target)) reached.add(target);
    }
  }
  expect(reached.size).toBeGreaterThan(0);
  expect(offences).toEqual([]);
});

// bench/peers is a package of its own, where the name does not resolve: it takes the public API by its path.
test("demo and bench import the public API alone, by the package's name where they can", () => {
  const files = ["demo", "bench"].filter((folder) => existsSync(join(ROOT, folder))).flatMap(parseFolder);
  const reaching = files.flatMap((file) => file.imports).filter((edge) =>
    edge.to.startsWith("src/")
    && !(edge.from.startsWith("bench/peers/") && /^src\/(?:reference\/)?index\.ts$/.test(edge.to)));
  expect(reaching.map((edge) => `${edge.from} imports ${edge.to}`)).toEqual([]);
});

test.each([
  ["src/gpu/pool.ts", `import { launch } from "../kernel/launch.ts";`, "launch.ts: kernel comes after gpu"],
  ["src/nn/linear.ts", `import type { T } from "../models/x.ts";`, "models comes after nn"],
  ["src/ops/add.ts", `export * from "../reference/add.ts";`, "never computes with its own reference"],
  ["src/reference/add.ts", `const x = await import("../ops/add.ts");`, "reference imports from tensor alone"],
  ["src/tensor/tensor.ts", `import { create } from "webgpu";`, "only src/gpu/provider.node.ts"],
  ["src/train/x.ts", `type T = import("../cli/main.ts").T;`, "cli comes after train"],
  ["src/tensor/x.ts", `import "../odd/x.ts";`, "src/odd is no room"],
  ["src/nn/x.ts", `import { add } from "krait";`, "sources name each other by path"],
  ["src/nn/x.ts", `import { add } from "../index.ts";`, "only users of the package import its index"],
  ["src/nn/x.ts", `import { r } from "../../test/support/random.ts";`, "sources import only from src"],
])("the rule names the edge of %s: %s", (path, text, message) => {
  const edge = parseSource(path, text).imports[0];
  expect(edge && offence(edge)).toContain(message);
  expect(edge && offence(edge)).toContain(path);
});

test("the rule lets good imports pass", () => {
  const good = parseSource("src/train/trainer.ts", `
    import { provider } from "#gpu";
    import { z } from "zod";
    import { add } from "../ops/add.ts";
    import { helper } from "./helper.ts";`);
  expect(good.imports.map(offence)).toEqual([null, null, null, null]);
});

test("a cycle is found through values and not through types", () => {
  const a = parseSource("src/ops/a.ts", `import { b } from "./b.ts";`);
  const value = parseSource("src/ops/b.ts", `import { a, type A } from "./a.ts";`);
  const type = parseSource("src/ops/b.ts", `import { type A } from "./a.ts";`);
  expect(findCycle([a, value])).toEqual(["src/ops/a.ts", "src/ops/b.ts", "src/ops/a.ts"]);
  expect(findCycle([a, type])).toBeNull();
});
