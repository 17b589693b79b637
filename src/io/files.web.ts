/** The browser's share of `#files`: folders behind URLs. Dropped files go through blobFolder. */
import { UsageError } from "../tensor/errors.ts";
import type { FileLayer } from "./checkpoint_files.ts";
import { urlFolder } from "./files.ts";
import type { Folder } from "./files.ts";

/** Files below an absolute or page-relative URL. */
export function openFolder(location: string): Folder {
  return urlFolder(location);
}

/** Checkpoint folders need renames and fsync, which a page does not have. Always throws UsageError. */
export function localFileLayer(): FileLayer {
  throw new UsageError("checkpoint folders: expected Node, found a browser (download the weights instead)");
}
