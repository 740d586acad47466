"""The teacher cache: what Stage II needs of a teacher, recorded once and read in the teacher's place."""
