// Grid folding: the number of a workgroup in a 1-D grid that was folded over x, y and z to stay below the
// limit of 65,535 workgroups per dimension.
//
// The folded grid may hold more workgroups than were asked for: compare the number with the real count.

fn workgroup_index(wid: vec3u, nwg: vec3u) -> u32 {
  return wid.x + nwg.x * (wid.y + nwg.y * wid.z);
}
