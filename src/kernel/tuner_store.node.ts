/** The tuner's measurements in Node: a file per adapter in the cache folder. */
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { cacheFolder } from "../gpu/fallback.node.ts";
import type { TunerStore } from "./tuner_store.ts";

export type { TunerStore } from "./tuner_store.ts";

/** Files below `folder()`, each replaced as a whole. */
export function folderStore(folder: () => string): TunerStore {
  const path = (name: string) => join(folder(), `${name}.json`);
  return {
    place: path,
    read: (name) => {
      try {
        return Promise.resolve(readFileSync(path(name), "utf8"));
      } catch {
        return Promise.resolve(null);
      }
    },
    write: (name, text) => {
      mkdirSync(folder(), { recursive: true, mode: 0o700 });
      const staging = `${path(name)}.${process.pid}`;
      writeFileSync(staging, text);
      renameSync(staging, path(name));
      return Promise.resolve();
    },
    remove: (name) => Promise.resolve(rmSync(path(name), { force: true })),
  };
}

export const tunerStore: TunerStore = folderStore(() => join(cacheFolder(), "tuning"));
