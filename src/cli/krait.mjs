#!/usr/bin/env node
// The command line's door: the packed package runs its build, a clone runs its sources directly.
import { existsSync } from "node:fs";

const root = new URL("../../", import.meta.url);
if (existsSync(new URL("src/cli/main.ts", root))) {
  await import("./source.mjs");
  await import("./main.ts");
} else {
  await import(new URL("dist/node/cli.js", root).href);
}
