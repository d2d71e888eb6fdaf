"""Scripted pick-and-place expert for LIBERO: no learning, privileged state, one closed loop per goal predicate.

A goal is a conjunction of predicates. The expert serves `on` and `in` goals about movable objects, one after another:
it reads the collision geometry, chooses a grasp (rim of a bowl, narrowest span of anything else, away from neighbours),
then runs the phases

  approach -> descend -> grasp -> lift -> carry -> lower -> release -> retreat

as a proportional controller in OSC_POSE deltas. A grasp or a placement that failed is planned again with another grasp.
Doors, drawers, knobs and pushing are not scripted: `unsupported` says so before any time is spent.
"""

import dataclasses

import numpy as np

from qdepth_jax.sim import libero

OPEN, CLOSE = -1.0, 1.0
FINGER_SPAN = 0.078  # widest object the gripper takes (m)
POSITION_GAIN = 14.0  # action units per metre of error; 1 unit = 0.05 m
ROTATION_GAIN = 3.0  # action units per radian of error; 1 unit = 0.5 rad
MAX_ROTATION = 0.5  # action units
PALM_REACH = (-0.10, -0.05, 0.05, 0.10)  # along the finger axis (m): the palm is wider than the open fingers
PALM_HEIGHT = 0.05  # of its underside above the fingertips (m)
MAX_TILT = 0.12  # rad of rotation left to do at most when the descent begins
MAX_RETRIES = 4
SURFACE_EXTENT = 1.5  # anything wider than this (m) is table or floor, not an obstacle


@dataclasses.dataclass(frozen=True)
class Phase:
    """speed: norm limit of the translation action. tolerance: distance to the target (m) that ends the phase.
    limit: control steps after which the phase ends anyway."""

    name: str
    gripper: float
    speed: float
    tolerance: float
    limit: int


PHASES = (
    Phase("approach", OPEN, 1.7, 0.025, 60),
    Phase("descend", OPEN, 1.0, 0.010, 30),
    Phase("grasp", CLOSE, 0.6, 0.0, 16),
    Phase("lift", CLOSE, 1.5, 0.06, 40),
    Phase("carry", CLOSE, 1.5, 0.025, 80),
    Phase("lower", CLOSE, 1.0, 0.016, 60),
    Phase("release", OPEN, 0.0, 0.0, 8),
    Phase("retreat", OPEN, 1.0, 0.0, 14),
)


@dataclasses.dataclass(frozen=True)
class Grasp:
    """yaw: direction of the finger-opening axis in the table plane (rad). point: where the fingers close, xyz (m)."""

    yaw: float
    point: np.ndarray


def unsupported(env: libero.LiberoEnv) -> list[str]:
    """Why the expert cannot do this task: one sentence per goal predicate it does not serve (empty = it can try)."""
    reasons = []
    domain = env.domain
    for goal in env.goals():
        text = " ".join(goal)
        if goal[0] not in ("on", "in"):
            reasons.append(f"goal ({text}): {goal[0]!r} is not scripted, only 'on' and 'in' are")
        elif goal[1] not in domain.objects_dict:
            reasons.append(f"goal ({text}): {goal[1]!r} is no movable object")
        elif goal[2] in domain.object_sites_dict and domain.object_sites_dict[goal[2]].joints:
            reasons.append(f"goal ({text}): {goal[2]!r} moves with a drawer or door, which the expert does not open")
    return reasons


class Expert:
    """Acts until every goal of the task holds: `action = expert.act()` from the environment's present observation."""

    def __init__(self, env: libero.LiberoEnv):
        reasons = unsupported(env)
        if reasons:
            raise ValueError("; ".join(reasons))
        self._env = env
        self._home = rotation_matrix(env.observation["robot0_eef_quat"])
        self._worker: PickPlace | None = None

    @property
    def gave_up(self) -> bool:
        """The last retry ended without the goal: going on would only repeat it."""
        return self._worker is not None and self._worker.gave_up

    def act(self) -> np.ndarray:
        """f32[7] in LIBERO's action convention."""
        open_goals = [goal for goal in self._env.goals() if not self._env.holds(goal)]
        if self._worker is None or (self._worker.goal not in open_goals and open_goals):
            self._worker = PickPlace(self._env, open_goals[0], self._home)
        return self._worker.act()


class PickPlace:
    """One object to one place."""

    def __init__(self, env: libero.LiberoEnv, goal: list[str], home: np.ndarray):
        """home: rotation matrix [3, 3] of the end effector at rest, which the grasp yaw stays close to."""
        self._env, self.goal = env, goal
        self._object, self._target = goal[1], goal[2]
        self._home, self._home_yaw = home, np.arctan2(home[1, 1], home[0, 1])
        self._into_basket = "basket" in self._target
        self._retries, self._tried, self.gave_up = 0, [], False
        self._plan()

    def _plan(self) -> None:
        """Chooses a grasp for the object where it lies now and starts the phases over."""
        env = self._env
        points = collision_points(env, self._object)
        self._start = env.observation[f"{self._object}_pos"].copy()
        self._bottom, self._top = points[:, 2].min(), points[:, 2].max()
        obstacles = Obstacles(env, without=self._object)
        plan = rim_grasp if "bowl" in self._object else span_grasp
        grasp = plan(points, obstacles, self._home_yaw, self._tried)
        self._tried.append(grasp.yaw)
        self._point = grasp.point
        self._rotation = gripper_down(grasp.yaw, self._home_yaw)
        # Come in above whatever stands around the object.
        self._hover = max(self._top, obstacles.height_near(grasp.point[:2], 0.07)) + 0.05
        self._held = np.zeros(3)  # hand minus object when the lift began
        self._opening = 0.0  # distance between the fingers one step ago (m)
        self._phase, self._age = 0, 0

    def act(self) -> np.ndarray:
        """f32[7]; advances the phase machine by one control step."""
        seen = self._env.observation
        hand = seen["robot0_eef_pos"]
        item = seen[f"{self._object}_pos"]
        phase = PHASES[self._phase]
        target = self._waypoint(phase.name, hand, item)
        end = self._point if phase.name == "descend" else target
        arrived = phase.tolerance > 0 and np.linalg.norm(end - hand) < phase.tolerance
        if phase.name == "approach":
            arrived = arrived and np.linalg.norm(self._turn_left()) < MAX_TILT
        opening = float(np.ptp(seen["robot0_gripper_qpos"]))
        if phase.name == "grasp":  # over when the fingers stopped, on the object or on each other
            arrived = self._age > 4 and abs(opening - self._opening) < 4e-4
        self._opening = opening
        self._age += 1
        # Holding, the object keeps its place below the hand; a growing gap means it slipped out or was never caught.
        lost = phase.name in ("lift", "carry", "lower") and hand[2] - item[2] > self._held[2] + 0.03
        if lost or (phase.name == "retreat" and self._age > phase.limit):
            if self._retries < MAX_RETRIES:
                self._retries += 1
                self._plan()
            else:
                self.gave_up = True
        elif arrived or self._age > phase.limit:
            self._phase, self._age = min(self._phase + 1, len(PHASES) - 1), 0
            if PHASES[self._phase].name == "lift":
                self._held = hand - item
        phase = PHASES[self._phase]
        target = self._waypoint(phase.name, hand, item)
        return self._towards(target, hand, phase)

    def _waypoint(self, name: str, hand: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Where the fingertips should be in this phase, xyz (m)."""
        if name == "approach":
            return np.array([*self._point[:2], self._hover])
        if name == "descend":
            # A funnel: the hand arrives with momentum and must not come down beside the grasp. It closes with time,
            # because at full reach the arm cannot take away the last centimetres up here.
            off = np.linalg.norm(self._point[:2] - hand[:2])
            limit = max(0.0, self._hover - self._point[2]) * max(0.0, 1.0 - self._age / 15)
            height = self._point[2] + np.clip(6.0 * (off - 0.006), 0.0, limit)
            return np.array([*self._point[:2], height])
        if name == "grasp":
            return self._point
        goal = self._goal_point()
        held = hand - item  # how the object hangs in the gripper
        place = goal[2] + (0.06 if self._into_basket else 0.012) + (self._start[2] - self._bottom) + self._held[2]
        cruise = max(place + (0.07 if self._into_basket else 0.06), self._hover - 0.02, self._point[2] + 0.10)
        if name == "lift":
            return np.array([*self._point[:2], cruise])
        if name == "carry":
            return np.array([*(goal[:2] + held[:2]), cruise])
        if name == "lower":
            return np.array([*(goal[:2] + held[:2]), place])
        if name == "release":
            self._exit = hand + np.array([0, 0, 0.12])
            return hand
        return self._exit

    def _turn_left(self) -> np.ndarray:
        """Rotation still to do, as axis times angle [3] (rad)."""
        present = rotation_matrix(self._env.observation["robot0_eef_quat"])
        return libero.axis_angle(quaternion_of(self._rotation @ present.T))

    def _towards(self, target: np.ndarray, hand: np.ndarray, phase: Phase) -> np.ndarray:
        move = np.clip((target - hand) * POSITION_GAIN, -1, 1)
        norm = np.linalg.norm(move)
        if norm > phase.speed:
            move *= phase.speed / norm
        turn = np.clip(self._turn_left() * ROTATION_GAIN, -MAX_ROTATION, MAX_ROTATION)
        return np.concatenate([move, turn, [phase.gripper]]).astype(np.float32)

    def _goal_point(self) -> np.ndarray:
        """Where the object's bottom centre should come to stand, xyz (m)."""
        domain = self._env.domain
        if self._target in domain.object_sites_dict:
            return np.array(self._env.sim.data.get_site_xpos(self._target))
        points = collision_points(self._env, self._target)
        return np.array([*((points.max(0) + points.min(0)) / 2)[:2], points[:, 2].max()])


def rim_grasp(points: np.ndarray, obstacles: "Obstacles", home_yaw: float, tried: list[float]) -> Grasp:
    """A bowl, by its rim: one finger inside, one outside, at the rim angle with the most room for finger and hand."""
    low, high = points.min(0), points.max(0)
    centre, radius = (low + high)[:2] / 2, (high - low)[:2].sum() / 4
    height = max(high[2] - 0.020, low[2] + 0.008)
    best = None
    for turn in np.deg2rad(np.arange(0, 360, 30)):
        yaw = home_yaw + turn
        outward = np.array([np.cos(yaw), np.sin(yaw)])
        rim = centre + (radius - 0.006) * outward
        finger_room = obstacles.clearance(centre + (radius + 0.035) * outward, height - 0.01)
        palm_room = min(obstacles.clearance(rim + s * outward, height + PALM_HEIGHT) for s in PALM_REACH)
        twist = abs((turn + np.pi / 2) % np.pi - np.pi / 2)
        again = sum(abs(np.angle(np.exp(1j * (old - yaw)))) < 0.2 for old in tried)
        cost = -8 * min(finger_room, 0.04) - 8 * min(palm_room, 0.04) + 0.03 * twist + 0.3 * again + 1.0 * rim[0]
        if best is None or cost < best[0]:
            best = (cost, yaw, rim)
    return Grasp(best[1], np.array([*best[2], height]))


def span_grasp(points: np.ndarray, obstacles: "Obstacles", home_yaw: float, tried: list[float]) -> Grasp:
    """Anything else, across its narrowest span at finger height, if both fingers have room there."""
    bottom, top = points[:, 2].min(), points[:, 2].max()
    height = max(top - 0.035, (top + bottom) / 2, bottom + 0.008)
    ring = points[np.abs(points[:, 2] - height) < 0.02]
    if len(ring) < 8:
        ring = points
    best = None
    for turn in np.deg2rad(np.arange(-90, 90, 7.5)):
        yaw = home_yaw + turn
        across = np.array([np.cos(yaw), np.sin(yaw)])
        along = np.array([-across[1], across[0]])
        a, b = ring[:, :2] @ across, ring[:, :2] @ along
        width = a.max() - a.min()
        middle = across * (a.max() + a.min()) / 2 + along * (b.max() + b.min()) / 2
        finger_room = min(obstacles.clearance(middle + s * across, height - 0.01) for s in (-0.05, 0.05))
        palm_room = min(obstacles.clearance(middle + s * across, height + PALM_HEIGHT) for s in PALM_REACH)
        again = sum(abs(np.angle(np.exp(2j * (old - yaw)))) < 0.2 for old in tried)
        cost = max(width, 0.03) + 10 * (width > FINGER_SPAN) + 0.004 * abs(turn) - 0.5 * min(finger_room, 0.03)
        cost += 0.01 * again - 1.0 * min(palm_room, 0.04)
        if best is None or cost < best[0]:
            best = (cost, yaw, middle)
    return Grasp(best[1], np.array([*best[2], height]))


class Obstacles:
    """Collision geoms of every object and fixture but one, each as the box around it: a cabinet with an open drawer is
    many boxes, and the drawer's inside is free."""

    def __init__(self, env: libero.LiberoEnv, without: str):
        domain = env.domain
        names = [n for n in (*domain.objects_dict, *domain.fixtures_dict) if n != without]
        clouds = [geom for name in names for geom in collision_geoms(env, name)]
        self._clouds = [cloud for cloud in clouds if np.ptp(cloud[:, :2], axis=0).max() < SURFACE_EXTENT]

    def clearance(self, xy: np.ndarray, above: float) -> float:
        """Distance (m, at most 1) to the nearest footprint box of whatever reaches higher than `above`."""
        nearest = 1.0
        for cloud in self._clouds:
            high = cloud[cloud[:, 2] > above, :2]
            if len(high):
                gap = np.maximum(0, np.maximum(high.min(0) - xy, xy - high.max(0)))
                nearest = min(nearest, float(np.linalg.norm(gap)))
        return nearest

    def height_near(self, xy: np.ndarray, radius: float) -> float:
        """Height (m) of the tallest thing whose footprint box comes within `radius` of xy; -inf if there is none."""
        tallest = -np.inf
        for cloud in self._clouds:
            gap = np.maximum(0, np.maximum(cloud[:, :2].min(0) - xy, xy - cloud[:, :2].max(0)))
            if np.linalg.norm(gap) < radius:
                tallest = max(tallest, float(cloud[:, 2].max()))
        return tallest


def collision_points(env: libero.LiberoEnv, name: str) -> np.ndarray:
    """Vertices f64 [N, 3] of all collision geometry of an object or fixture in world coordinates (m)."""
    return np.concatenate(collision_geoms(env, name))


def collision_geoms(env: libero.LiberoEnv, name: str) -> list[np.ndarray]:
    """Vertices f64 [N, 3] of each collision geom of an object or fixture in world coordinates (m)."""
    from mujoco import mjtGeom

    domain, model, data = env.domain, env.model, env.data
    thing = domain.objects_dict.get(name) or domain.fixtures_dict[name]
    root = env.sim.model.body_name2id(thing.root_body)
    inside = np.zeros(model.nbody, bool)
    for body in range(root, model.nbody):  # MuJoCo numbers parents before children
        inside[body] = body == root or inside[model.body_parentid[body]]
    found = []
    for geom in np.flatnonzero(inside[model.geom_bodyid]):
        if model.geom_contype[geom] == 0 and model.geom_conaffinity[geom] == 0:
            continue
        kind, size = model.geom_type[geom], model.geom_size[geom]
        corners = np.stack(np.meshgrid((-1, 1), (-1, 1), (-1, 1)), -1).reshape(-1, 3)
        if kind == mjtGeom.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            vertices = model.mesh_vert[first : first + count]
        elif kind in (mjtGeom.mjGEOM_CYLINDER, mjtGeom.mjGEOM_CAPSULE):
            angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            circle = np.stack([np.cos(angle) * size[0], np.sin(angle) * size[0], 0 * angle], 1)
            up = np.array([[0, 0, size[1]]])
            vertices = np.concatenate([circle + up, circle - up])
        elif kind == mjtGeom.mjGEOM_BOX:
            vertices = corners * size
        else:
            vertices = corners * size[0]
        found.append(vertices @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return found


def gripper_down(yaw: float, home_yaw: float) -> np.ndarray:
    """Rotation matrix [3, 3] of a gripper pointing straight down with its finger axis at `yaw`.

    Both fingers are alike, so the half turn that is closer to home_yaw is taken.
    """
    turn = (yaw - home_yaw + np.pi / 2) % np.pi - np.pi / 2 + home_yaw
    y = np.array([np.cos(turn), np.sin(turn), 0.0])
    z = np.array([0.0, 0.0, -1.0])
    return np.stack([np.cross(y, z), y, z], axis=1)


def rotation_matrix(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """Unit quaternion (x, y, z, w) to a rotation matrix [3, 3]."""
    x, y, z, w = quaternion_xyzw / np.linalg.norm(quaternion_xyzw)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_of(rotation: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] to the unit quaternion (x, y, z, w) with w >= 0."""
    # The eigenvector of the largest eigenvalue of this symmetric matrix: stable near half turns, unlike the formula
    # with the trace.
    r = rotation
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[2, 1] - r[1, 2]],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1], r[0, 2] - r[2, 0]],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], r.trace()],
        ]
    )
    quaternion = np.linalg.eigh(k)[1][:, -1]
    return quaternion if quaternion[3] >= 0 else -quaternion
