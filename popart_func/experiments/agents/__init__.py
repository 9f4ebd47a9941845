"""Agents as pure functions over lanes: ``init(key)`` and ``step(state)``, see `agent`."""

from popart_func.experiments.agents.actor_critic import ppo, v_trace
from popart_func.experiments.agents.agent import Agent, Experience
from popart_func.experiments.agents.critics import Critic, make_critic
from popart_func.experiments.agents.multi_task import multi_task_q_learning
from popart_func.experiments.agents.q_learning import dqn, q_learning
from popart_func.experiments.agents.streaming import stream_q

__all__ = [
    "Agent",
    "Critic",
    "Experience",
    "dqn",
    "make_critic",
    "multi_task_q_learning",
    "ppo",
    "q_learning",
    "stream_q",
    "v_trace",
]
